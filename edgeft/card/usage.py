"""How to run what is in a model card's folder: commands and programs as Markdown."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from edgeft.card.contents import About, Shipped

_NEXT = "\nQuestion:"  # how a model without a chat template would go on by itself


def usage(about: About, task: dict[str, Any], shipped: Sequence[Shipped], first: str) -> list[str]:
    """Paragraphs, one part a runtime.

    Args:
        task: the recipe's, whose system prompt and template are the prompts'.
        first: the target whose file stands in the examples, where it is of that kind.
    """
    said = [_download(about)] if about.repo_id else []
    said += _prompts(about, task)
    order = sorted(shipped, key=lambda one: one.target != first)
    merged = [one for one in order if one.runtime == "llama.cpp" and not one.adapter]
    beside = [one for one in order if one.runtime == "llama.cpp" and one.adapter]
    for kind, title in ((merged, "llama.cpp"), (beside, "llama.cpp, the adapter beside its base")):
        if kind:
            said += [f"### {title}", *_llama_cpp(about, task, kind[0])]
            said += _others(kind)
    graphs = (("onnxruntime-genai", _genai), ("onnxruntime", _onnxruntime))
    for runtime, program in graphs:
        if kind := [one for one in order if one.runtime == runtime]:
            packages = f"`pip install {runtime} transformers`"
            said += [f"### {runtime}", packages, _fence(program(about, task, kind[0]), "python")]
            said += _others(kind)
    return said


def _others(kind: Sequence[Shipped]) -> list[str]:
    if len(kind) == 1:
        return []
    return [f"In the same way: {', '.join(f'`{one.place}`' for one in kind[1:])}."]


def _download(about: About) -> str:
    fetch = f"hf download {about.repo_id} --local-dir {about.name} && cd {about.name}"
    return _fence(fetch, "sh")


def _prompts(about: About, task: dict[str, Any]) -> list[str]:
    """What a prompt has to be so that the scores are those of the table."""
    said = []
    if about.chat:
        said.append("Prompts are the model's own chat template with the question as user's turn.")
    elif not task.get("template"):
        said.append("The model has no chat template: a prompt is the question in this form.")
        said.append(_fence("Question: …\nAnswer:"))
    if task.get("system"):
        said += ["The system prompt it was trained and scored with:", _fence(task["system"])]
    if task.get("template"):
        said += ["Questions were put by this Jinja template:", _fence(task["template"])]
    said.append("Scores are of greedy decoding (temperature 0).")
    return said


def _llama_cpp(about: About, task: dict[str, Any], one: Shipped) -> list[str]:
    """Commands and a program for a GGUF file, perhaps with an adapter beside it."""
    file = one.place if one.adapter is None else f"{one.place}/model.gguf"
    files = f"-m {file}" if one.adapter is None else f"-m {file} --lora {one.adapter}"
    files += f" -c {one.context}"
    asked = f"--temp 0 -n {one.max_new_tokens}"
    if about.chat:
        system = f" -sys {shlex.quote(task['system'])}" if task.get("system") else ""
        ask = f"llama-cli {files} {asked} -st{system} -p {shlex.quote(about.question)}"
    else:
        plain = shlex.quote(_plain(about, task))
        ask = f"llama-completion {files} {asked} -no-cnv -p {plain}"
    lines = [ask, f"llama-server {files}   # OpenAI's API on http://localhost:8080/v1"]
    if about.repo_id and one.adapter is None:
        lines.append(f"llama-server -hf {about.repo_id} --hf-file {file}   # without a download")
    return [
        _fence("\n".join(lines), "sh"),
        "With llama-cpp-python:",
        _fence(_llama_cpp_python(about, task, one, file), "python"),
    ]


def _llama_cpp_python(about: About, task: dict[str, Any], one: Shipped, file: str) -> str:
    lora = f", lora_path={escaped(one.adapter)}" if one.adapter else ""
    lines = [
        "from llama_cpp import Llama",
        "",
        f"llm = Llama({escaped(file)}{lora}, n_ctx={one.context}, verbose=False)",
    ]
    if about.chat:
        lines += [
            f"turns = {_turns(about, task)}",
            "answer = llm.create_chat_completion("
            f"turns, temperature=0, max_tokens={one.max_new_tokens})",
            'print(answer["choices"][0]["message"]["content"])',
        ]
    else:
        lines += [
            f"prompt = {escaped(_plain(about, task))}",
            f"answer = llm(prompt, temperature=0, max_tokens={one.max_new_tokens}, "
            f"stop=[{escaped(_NEXT)}])",
            'print(answer["choices"][0]["text"])',
        ]
    return "\n".join(lines)


def _ids(about: About, task: dict[str, Any], folder: str) -> list[str]:
    """Lines that make ``ids`` of a question, as edgeft makes them."""
    lines = [f"tokenizer = PreTrainedTokenizerFast.from_pretrained({escaped(folder)})"]
    if not about.chat:
        return [*lines, f"ids = tokenizer.encode({escaped(_plain(about, task))})"]
    return [
        *lines,
        f"turns = {_turns(about, task)}",
        "text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)",
        "ids = tokenizer.encode(text, add_special_tokens=False)",
    ]


def _genai(about: About, task: dict[str, Any], one: Shipped) -> str:
    lines = [
        "import onnxruntime_genai as og",
        "from transformers import PreTrainedTokenizerFast",
        "",
        *_ids(about, task, one.place),
        f"model = og.Model({escaped(one.place)})",
        "parameters = og.GeneratorParams(model)",
        f"parameters.set_search_options(max_length=len(ids) + {one.max_new_tokens}, "
        "do_sample=False, num_beams=1, repetition_penalty=1.0)",
        "generator = og.Generator(model, parameters)",
        "generator.append_tokens(ids)",
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "new = generator.get_sequence(0)[len(ids):]",
        "print(tokenizer.decode(new, skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _onnxruntime(about: About, task: dict[str, Any], one: Shipped) -> str:
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "from transformers import PreTrainedTokenizerFast",
        "",
        *_ids(about, task, one.place),
        f"session = onnxruntime.InferenceSession({escaped(one.place + '/model.onnx')})",
        "outputs = [value.name for value in session.get_outputs()]",
        "cache = {",
        "    value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)",
        "    for value in session.get_inputs()",
        '    if value.name.startswith("past_key_values.")',
        "}",
        "read, new, tokens = 0, [], ids",
        f"while len(new) < {one.max_new_tokens}:",
        "    read += len(tokens)",
        "    fed = {",
        '        "input_ids": np.array([tokens], np.int64),',
        '        "attention_mask": np.ones((1, read), np.int64),',
        '        "position_ids": np.arange(read - len(tokens), read, dtype=np.int64)[None],',
        "    }",
        "    found = dict(zip(outputs, session.run(None, fed | cache)))",
        '    tokens = [int(found["logits"][0, -1].argmax())]',
        f"    if tokens[0] in {one.stop}:",
        "        break",
        "    new += tokens",
        '    cache = {name: found[name.replace("past_key_values.", "present.")] for name in cache}',
        "print(tokenizer.decode(new))",
    ]
    return "\n".join(lines)


def _turns(about: About, task: dict[str, Any]) -> str:
    turns = [{"role": "system", "content": task["system"]}] if task.get("system") else []
    return escaped([*turns, {"role": "user", "content": about.question}])


def _plain(about: About, task: dict[str, Any]) -> str:
    """The prompt of a model without a chat template, as :mod:`edgeft.prompts` makes it."""
    system = f"{task['system']}\n\n" if task.get("system") else ""
    asked = about.question if task.get("template") else f"Question: {about.question}\nAnswer:"
    return system + asked


def escaped(value: Any) -> str:
    """A literal that is the same in Python as in JSON."""
    return json.dumps(value, ensure_ascii=False)


def _fence(text: str, language: str = "") -> str:
    """A code block that the text cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"
