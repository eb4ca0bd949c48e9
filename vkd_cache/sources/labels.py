"""The class index in a `.cls` or `.json` member of a sample."""

import json

_LARGEST = 2**32 - 1


def parse_cls(data: bytes) -> int:
    """A whole number in ASCII digits, white space around it allowed.

    Raises:
        ValueError: anything else, with what was found.
    """
    text = data.strip()
    if not text.isdigit() or len(text) > 10 or int(text) > _LARGEST:
        raise ValueError(f".cls holds {ascii(data[:20])[1:]}, not a class index")
    return int(text)


def parse_json(data: bytes) -> int:
    """The whole number under `label`, or else under `cls`.

    Raises:
        ValueError: not JSON, or no class index there, with what was found.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(".json is not valid JSON") from error
    if isinstance(document, dict):
        for field in ("label", "cls"):
            if field in document:
                label = document[field]
                if type(label) is not int or not 0 <= label <= _LARGEST:
                    raise ValueError(f".json holds {field} {ascii(label)[:20]}, not a class index")
                return label
    raise ValueError(".json has neither label nor cls")


def parse_label(cls: bytes | None, document: bytes | None) -> int:
    """The label of a sample that has a `.cls`, a `.json` (metadata without a label, when there is a `.cls`), or both.

    Raises:
        ValueError: neither gives a class index, or they disagree.
    """
    if cls is None:
        return parse_json(document or b"")
    label = parse_cls(cls)
    if document is not None:
        try:
            other = parse_json(document)
        except ValueError:
            return label
        if other != label:
            raise ValueError(f".cls says {label}, .json says {other}")
    return label
