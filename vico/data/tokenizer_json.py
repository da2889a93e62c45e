"""One form of a tokenizer.json for all versions of the package `tokenizers`.

They write the same tokenizer in different words. A file that was saved again must not pass for
another tokenizer, so this form and not the file's is digested.
"""

from typing import Any

from vico.io.digest import digest_json

# The prompts add BOS and EOS. Nothing is cut or padded.
UNUSED = {"post_processor": None, "truncation": None, "padding": None}


def begins_with_special(content: dict[str, Any]) -> bool:
    """Whether the file's own post-processor puts a special token before a text."""
    return _puts_first(content.get("post_processor"))


def _puts_first(processor: Any) -> bool:
    """`processor`: of a text, or a list of several one after another."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        parts = processor.get("processors")
        return isinstance(parts, list) and any(map(_puts_first, parts))
    template = processor.get("single")
    return isinstance(template, list) and bool(template) and "SpecialToken" in template[0]


def digest(content: dict[str, Any]) -> str:
    """Of what the file says of its function."""
    return digest_json(_in_one_form(content | UNUSED))


def earlier_digest(content: dict[str, Any]) -> str:
    """The digest that checkpoints recorded until November 2026: of the file's own words."""
    return digest_json(content | UNUSED)


def _in_one_form(value: Any) -> Any:
    """`value` without what is absent from the files of some versions and means the same.

    That is null, false, and what a version has in another form.
    """
    if isinstance(value, list):
        return [_in_one_form(item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    if isinstance(fields.get("merges"), list):  # before 0.20, two pieces in one text
        fields["merges"] = [m.split(" ") if isinstance(m, str) else m for m in fields["merges"]]
    if fields.get("type") == "Metaspace":
        # Before 0.19: one switch, and no choice whether words are split.
        always = "always" if fields.pop("add_prefix_space", True) else "never"
        fields = {"prepend_scheme": always, "split": True} | fields
        fields.pop("str_rep", None)  # `replacement` again
    if fields.get("type") == "ByteLevel":
        fields.setdefault("use_regex", True)  # before 0.12, no choice
    kept = {k: v for k, v in fields.items() if v is not None and v is not False}
    return {name: _in_one_form(item) for name, item in kept.items()}
