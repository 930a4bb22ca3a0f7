"""What the study report and the audit page share: their templates' parts, style and script."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

PARTS, SCRIPT = "page_parts.html", "page_script.js"  # beside this module
# Of JSON in a script element: what could end the element or begin a comment.
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def rendered(template: str, scripts: tuple[str, ...] = (SCRIPT,), **values: Any) -> str:
    """The page of a template beside this module, with `values` escaped and `scripts` inside, which
    are the only ones that a browser may run: the page's policy names them by their hash.
    """
    folder = Path(__file__).parent
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none';"
        f" form-action 'none'; script-src 'sha256-{digest}'"
    )
    return pages.get_template(template).render(
        policy=policy, script=Markup(script), parts=PARTS, **values
    )


def embedded(value: Any) -> Markup:
    """A value as JSON that is safe inside a script element and parses back to the value. Raises
    ValueError for NaN and infinities, which JSON does not have.
    """
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ValueError("a page's data hold NaN or an infinity, which JSON lacks") from error
    return Markup(text.translate(str.maketrans(_ESCAPED)))
