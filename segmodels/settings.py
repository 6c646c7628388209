"""Fields of a configuration that carry their bounds and explanation; reading, merging and checking made of them.

A configuration is a dataclass of sections, which are dataclasses of fields made by :func:`setting`.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or out of range; the message names key, value and what is expected."""


def setting(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    length: int | None = None,
) -> Any:
    """A field. ``low``/``high`` are inclusive bounds, ``above`` an exclusive one; for lists they hold for each element."""
    metadata = {"text": text, "low": low, "above": above, "high": high, "choices": choices, "length": length}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def read_recipe(path: Path, sections: Iterable[str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The sections of a recipe on top of those of its ``base``, a file beside it without ``.yaml``; and ``paper``, which says
    what it reproduces (:mod:`segmodels.reproduce`). Lists replace lists, dictionaries are merged.

    Args:
        sections: what a configuration has, for the message.
        above: the recipes whose base this is.

    Raises:
        ConfigError: unreadable YAML, or a base that is missing or stands on itself.
    """
    given = dict(_read_yaml(path, sections))
    name = given.pop("base", None)
    if name is None:
        return given
    base = path.parent / f"{name}.yaml"
    if not base.is_file() or base in (*above, path):
        raise ConfigError(f"{path}: its base {str(base)!r} {'stands on it' if base.is_file() else 'does not exist'}")
    return _overlaid(read_recipe(base, sections, (*above, path)), given)


def _overlaid(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _overlaid(below.get(key), value) for key, value in above.items()}


def _read_yaml(path: Path, sections: Iterable[str]) -> dict[str, Any]:
    try:
        given = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected sections {', '.join(sections)}, found {type(given).__name__}")
    return typing.cast("dict[str, Any]", given)


def merge(merged: DictConfig, given: Any, source: str, sections: Mapping[str, type]) -> None:
    """Merges key by key, so that a failure can be named."""
    for section, values in given.items():
        if section not in sections:
            raise ConfigError(f"unknown section {section!r} in {source}{closest(section, sections)}; "
                              f"expected one of {', '.join(sections)}")  # fmt: skip
        if not isinstance(values, dict):
            raise ConfigError(f"{section}={values!r} in {source}: expected keys of this section")
        hints = typing.get_type_hints(sections[section])
        items = {item.name: item for item in fields(sections[section])}
        for key, value in values.items():
            if key not in items:
                raise ConfigError(f"unknown key {section}.{key} (value {value!r}) in {source}{closest(key, items)}; "
                                  f"expected one of {', '.join(items)}")  # fmt: skip
            expected = expected_text(hints[key], items[key].metadata)
            # OmegaConf would turn 1.0 into True, 3 into "3" and "yes" into True; a setting of another type is a mistake.
            if not _fits(value, hints[key]):
                raise ConfigError(f"{section}.{key}={value!r} in {source}: expected {expected}")
            try:
                merged[section].merge_with({key: value})
            except OmegaConfBaseException as error:
                raise ConfigError(f"{section}.{key}={value!r} in {source}: expected {expected}") from error


def check_resolved(merged: DictConfig, raw: dict[str, Any]) -> None:
    for section, values in raw.items():
        for key, value in values.items():
            try:
                OmegaConf.to_container(merged[section], resolve=True) if isinstance(value, dict) else merged[section][key]
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0].replace("KeyError raised while resolving interpolation: ", "").strip('"')
                raise ConfigError(
                    f"{section}.{key}={value!r}: {reason}; set it, or give {section}.{key}=VALUE on the command line"
                ) from error


def check_ranges(config: Any, sections: Mapping[str, type]) -> None:
    for section, kind in sections.items():
        values = getattr(config, section)
        hints = typing.get_type_hints(kind)
        for item in fields(kind):
            value, meta = getattr(values, item.name), item.metadata
            entries = value if isinstance(value, list) else [value]
            wrong = [entry for entry in entries if entry is not None and not _in_range(entry, meta)]
            if wrong or (meta["length"] is not None and value is not None and len(entries) != meta["length"]):
                raise ConfigError(f"{section}.{item.name}={value!r}: expected {expected_text(hints[item.name], meta)}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str) and "${" in value:
        return True
    if value is None:
        return type(None) in typing.get_args(hint)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] if _optional(hint) else [hint]
    kind = kinds[0]
    origin = typing.get_origin(kind)
    if origin is list:
        (element,) = typing.get_args(kind)
        return isinstance(value, list) and all(_fits(entry, element) for entry in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _in_range(value: Any, meta: Any) -> bool:
    if meta["choices"]:
        return value in meta["choices"]
    if isinstance(value, (int, float)):
        # written so that nan fails
        return ((meta["low"] is None or value >= meta["low"]) and (meta["above"] is None or value > meta["above"])
                and (meta["high"] is None or value <= meta["high"]) and abs(value) != float("inf"))  # fmt: skip
    return True


def expected_text(hint: Any, meta: Any) -> str:
    kind = str(hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint)
    text = kind.replace("typing.", "").replace("NoneType", "None").replace("None", "null")
    if meta["choices"]:
        return f"one of {', '.join(meta['choices'])}"
    bounds = [f"{sign} {meta[name]:g}" for name, sign in (("low", ">="), ("above", ">"), ("high", "<="))
              if meta[name] is not None]  # fmt: skip
    if meta["length"] is not None:
        text += f" of {meta['length']}"
    return ", ".join([text, " and ".join(bounds)]) if bounds else text


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def closest(word: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
