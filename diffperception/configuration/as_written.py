"""YAML whose values stay as they are written, until the type of an option says what they are."""

import re
from typing import Any

import yaml

NULL = "tag:yaml.org,2002:null"
TEXT = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"
PAIR = r"-?\d+:-?\d+"  # as in {0:0,255:1}


class _AsWritten(yaml.SafeLoader):
    """Reads every plain scalar as text but an option's null: `no`, `012`, `1e3` and `5:30` are names of classes too."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the parent has it)
        first: [(tag, pattern) for tag, pattern in pairs if tag in (NULL, MERGE)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_sequence(self, node: yaml.SequenceNode, deep: bool = False) -> list[Any]:
        for item in node.value:  # in a list even null is a name; where it is none, the type of the items makes it one
            if isinstance(item, yaml.ScalarNode) and item.tag == NULL:
                item.tag = TEXT
        return super().construct_sequence(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag == NULL:
                key.tag = TEXT
        found = super().construct_mapping(node, deep)
        if all(value is None and re.fullmatch(PAIR, str(key)) for key, value in found.items()):
            return dict(str(key).split(":") for key in found)  # YAML asks for a blank after the colon, people do not
        return found


def load_as_written(text: str) -> Any:
    """What a YAML text says, its scalars as texts; None for the value null of an option. YAMLError for no YAML."""
    return yaml.load(text, Loader=_AsWritten)
