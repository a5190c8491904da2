"""The child that scores: it opens the artifact and knows nothing of files to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeft import child
from edgeft.bench import divergence
from edgeft.bench.job import job_of_request
from edgeft.prompts import first, own_answer, read_items
from edgeft.runtimes import open_session
from edgeft.tasks import grading

Emit = Callable[..., None]


def score(request: dict[str, Any], emit: Emit) -> None:
    """Likelihoods of the questions not scored yet, then answers to those not answered yet."""
    from tokenizers import Tokenizer

    job = job_of_request(request["job"])
    items = first(read_items(job.evaluation), request["limit"])
    grading.check_installed(item.answer for item in items)
    read = grading.reader(job.task, job.pattern)
    words = Tokenizer.from_file(str(job.tokenizer))
    session = open_session(
        job.runtime,
        job.artifact,
        threads=job.threads,
        context=job.context,
        parallel=job.parallel,
    )
    known = set(request["scored"])
    left = [item for item in items if item.id not in known]
    pairs = [(item.prompt, item.gold) for item in left]
    reference = divergence.read(job.reference) if job.reference else None
    kl = divergence.divergences(session, left, reference) if reference else {}
    for item, logprob in zip(left, session.score(pairs), strict=True):
        taken = {"kl": kl[item.id]} if item.id in kl else {}
        emit("score", id=item.id, gold_logprob=logprob, gold_tokens=len(item.gold), **taken)
    known = set(request["answered"])
    left = [item for item in items if item.id not in known]
    prompts = [item.prompt for item in left]
    for done in session.generate(prompts, job.max_new_tokens, set(job.stop)):
        item = left[done.index]
        text = words.decode(done.tokens, skip_special_tokens=True)
        found = read(own_answer(text), item.answer)
        emit(
            "answer",
            id=item.id,
            group=item.group,
            tokens=done.tokens,
            text=text,
            answer=found.answer,
            read=found.how,
            correct=grading.same(found.answer, item.answer),
            finish=done.finish,
            seconds=round(done.seconds, 4),
        )
    session.close()


if __name__ == "__main__":
    child.serve(score)
