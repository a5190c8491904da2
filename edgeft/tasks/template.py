"""A recipe's prompt template: Jinja over a question and its row's columns, in a sandbox."""

from __future__ import annotations

from collections.abc import Callable

from edgeft.errors import UserError


def renderer(template: str | None) -> Callable[[dict[str, object], str], str] | None:
    """``render(columns, where)`` of a template; ``where`` is what errors name. None without one.

    Raises:
        UserError: it is no Jinja, or, later, it does not render.
    """
    if template is None:
        return None
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("a template needs Jinja: pip install 'edgeft[train]'") from error
    try:
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"task.template is no Jinja: {error}") from error

    def render(columns: dict[str, object], where: str) -> str:
        try:
            text = compiled.render(columns)
        except Exception as error:  # whatever a user's Jinja raises
            there = ", ".join(columns)
            raise UserError(
                f"task.template does not render at {where}: {error}; it may use: {there}"
            ) from error
        if not text.strip():
            raise UserError(f"task.template renders to nothing at {where}")
        return text

    return render
