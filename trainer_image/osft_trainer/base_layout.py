"""Which tensors of a model were made of which tensors of its base's files.

Lives here: the way there, as transformers goes while it loads (it renames, joins and cuts), and the
way back. Called by `dense` and `unused_weights` on the first rank, by `masters` and `assembly` on
every rank; the model may be on meta, converted or sharded. Must never: hold numbers, or guess: what
does not come back under the names and shapes of the files is an error.

transformers' own way back (`save_pretrained`) begins at the model's names, and cannot know how the
files had them where several names load alike (with and without a prefix, old names, towers that are
left out). Here each name of the files is followed to the model by transformers' own rules, and its
conversions are turned round for the tensors that belong together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from osft_trainer.base_weights import BaseWeights, versions
from osft_trainer.experts import TRAINED_SUFFIX, MasterParameter
from osft_trainer.linear import SubspaceWeight

_VERSIONS = "osft_base_versions"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """One tensor of the model before conversion."""

    names: tuple[str, ...]
    """Several where it is tied."""
    source: SubspaceWeight | Tensor
    """A target, or the tensor itself: the float32 master of one that has such."""
    is_trained: bool

    @property
    def shape(self) -> torch.Size:
        """As the model has it, all rows."""
        source = self.source
        return source.base.shape if isinstance(source, SubspaceWeight) else source.shape

    @property
    def dtype(self) -> torch.dtype:
        """As the model was loaded; of a float32 master its own."""
        source = self.source
        return source.base.dtype if isinstance(source, SubspaceWeight) else source.dtype


@dataclass(frozen=True)
class Group:
    """Tensors of the model, and those of the files that they are made of together."""

    model: tuple[str, ...]
    files: tuple[str, ...]
    """In the order in which they are put together."""
    converter: WeightConverter | None = None
    """None where one tensor has another name, at most."""
    converted_names: Mapping[str, str] = field(default_factory=dict)
    """What the converter calls the tensors of the files: their names there, renamed."""
    prefix: str = ""

    def to_model(self, hf: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the files, all of the group, as the model has them."""
        if self.converter is None:
            return {self.model[0]: tensors[self.files[0]]}
        made = self._made(hf, tensors)
        return self._named(made, self.model)

    def to_files(self, hf: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model, all of the group, as the files have them."""
        if self.converter is None:
            return dict.fromkeys(self.files, tensors[self.model[0]])
        reverse = self.converter.reverse_transform()
        made = _convert(hf, reverse, {name: tensors[name] for name in self.model})
        by_name = self._named(made, self.converted_names.values())
        return {name: by_name[self.converted_names[name]] for name in self.files}

    def with_all_names(
        self, hf: PreTrainedModel, present: Mapping[str, bool], shapes: Shapes
    ) -> Group:
        """With every tensor of the model that the conversion makes, not the first alone."""
        assert self.converter is not None
        if len(self.converter.target_patterns) == 1:
            return self
        with _as_value_error():
            made = self._made(hf, _on_paper({name: shapes[name] for name in self.files}))
        return replace(self, model=tuple(_in_model(n, present, self.prefix) for n in made))

    def _made(self, hf: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        renamed = {self.converted_names[name]: tensors[name] for name in self.files}
        return _convert(hf, deepcopy(self.converter), renamed)

    def _named(self, made: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Tensor]:
        """What a conversion has made, by the names wanted: with or without the model's prefix."""
        bare = {name.removeprefix(self.prefix): name for name in wanted}
        found = {name.removeprefix(self.prefix): value for name, value in made.items()}
        if bare.keys() != found.keys():
            names = ", ".join(sorted(bare.keys() ^ found.keys())[:3])
            raise ValueError(f"a conversion makes other tensors than it was made of: {names}")
        return {
            bare[name]: value[0] if isinstance(value, list) else value
            for name, value in found.items()
        }


@dataclass(frozen=True)
class Layout:
    """All of a base's files."""

    groups: tuple[Group, ...]
    of: Mapping[str, Group]
    """By each name of the model that the files have anything for."""
    unused: Mapping[str, str]
    """Tensors of the files that no tensor of the model is made of, with the names that the model
    would have them under."""


def parts_of(hf: nn.Module) -> list[Part]:
    """Every tensor of a model before conversion, in the order of its modules."""
    names: dict[int, list[str]] = {}
    sources: dict[int, tuple[SubspaceWeight | Tensor, bool]] = {}

    def add(key: object, name: str, source: SubspaceWeight | Tensor, is_trained: bool) -> None:
        names.setdefault(id(key), []).append(name)
        sources[id(key)] = source, is_trained

    for path, module in hf.named_modules(remove_duplicate=False):
        if isinstance(module, SubspaceWeight):
            add(module, _original_name(path), module, True)
        elif isinstance(module, MasterParameter):
            add(module, _original_name(path), module.value, True)
        else:
            own = [*module.named_parameters(recurse=False), *_persistent_buffers(module)]
            for name, tensor in own:
                add(tensor, f"{path}.{name}" if path else name, tensor, tensor.requires_grad)
    return [Part(tuple(dict.fromkeys(names[key])), *sources[key]) for key in names]


def remember_files(hf: PreTrainedModel, folder: Path) -> None:
    """Note of which files a model was made, for `check_same_files`."""
    hf.__dict__[_VERSIONS] = versions(folder)


def check_same_files(hf: PreTrainedModel, folder: Path) -> None:
    """Make sure that what was trained is added to the weights that it was trained on.

    Raises:
        OSError: a weight file is another one now; a new attempt tells whether the base is.
    """
    noted = hf.__dict__.get(_VERSIONS)
    found = versions(folder)
    if noted is not None and noted != found:
        names = sorted(n for n in {*noted, *found} if noted.get(n) != found.get(n))
        raise OSError(
            f"model_path: {names[0]} in {folder} has been changed since it was loaded, and what "
            "was trained does not belong to it: put the old file back"
        )


def layout_of(hf: PreTrainedModel, weights: BaseWeights) -> Layout:
    """Follow each name of the files to the model, as transformers does.

    Raises:
        ValueError: the tensors of one conversion do not make what the model has.
    """
    renamings, converters = _conversions(hf)
    present = {name: True for part in parts_of(hf) for name in part.names}
    prefix = hf.base_model_prefix
    direct: dict[str, list[str]] = {}
    joined: dict[str, list[str]] = {}
    found: dict[str, WeightConverter] = {}
    unused: dict[str, str] = {}
    for key in sorted(weights.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, present)
        if name not in present and key in present:
            name, pattern = rename_source_key(key, [], [], prefix, present)
        if name not in present:
            unused[key] = name
        elif pattern is None:
            direct.setdefault(name, []).append(key)
        else:
            joined.setdefault(name, []).append(key)
            found[name] = next(c for c in converters if pattern in c.source_patterns)
    groups = [Group((name,), tuple(keys)) for name, keys in direct.items()]
    shapes = {key: entry.shape for key, entry in weights.entries.items()}
    for name, keys in joined.items():
        bare = {key: _renamed(key, renamings) for key in keys}
        group = Group((name,), tuple(keys), found[name], bare, f"{prefix}." if prefix else "")
        groups.append(group.with_all_names(hf, present, shapes))
    return Layout(tuple(groups), {name: g for g in groups for name in g.model}, unused)


def check_way_back(hf: PreTrainedModel, folder: Path, names: Iterable[str]) -> None:
    """Make sure that what is trained can be written as the files have it, before it is trained.

    On paper, and of one tensor of each conversion with the numbers of the files.

    Args:
        hf: may be on meta.
        folder: of the base.
        names: in the model, of what is trained.

    Raises:
        ValueError: says what is in the way.
    """
    weights = BaseWeights(folder)
    layout = layout_of(hf, weights)
    groups = {id(group): group for name in names if (group := layout.of.get(name)) is not None}
    tried: set[tuple[str, ...]] = set()
    for group in groups.values():
        if group.converter is None:
            continue
        files = {key: weights.entries[key] for key in group.files}
        patterns = tuple(group.converter.target_patterns)
        try:
            with _as_value_error():
                _go_round(hf, group, _on_paper({key: one.shape for key, one in files.items()}))
                if patterns not in tried:
                    _go_round(hf, group, {key: weights.read(key) for key in files})
        except ValueError as error:
            raise ValueError(
                f"model_path: {group.files[0]} in {folder} is joined with other tensors while it "
                f"is loaded, and the way back is barred ({error}), so that it could not be saved "
                "once it is trained: give target_patterns that leave it out"
            ) from error
        tried.add(patterns)


def _go_round(hf: PreTrainedModel, group: Group, tensors: Mapping[str, Tensor]) -> None:
    """To the model and back."""
    for name, tensor in group.to_files(hf, group.to_model(hf, tensors)).items():
        before = tensors[name]
        if tensor.shape != before.shape:
            raise ValueError(f"{name} would have the shape {tuple(tensor.shape)}")
        if not tensor.is_meta and not torch.equal(tensor, before):
            raise ValueError(f"{name} would have other numbers")


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Conversions of other people's models tell in any of these ways that tensors do not fit."""
    try:
        yield
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the conversion of these tensors fails ({error})") from error


def _convert(
    hf: PreTrainedModel, transform: WeightTransform, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Carry out one conversion, either way."""
    first = ""
    for name, tensor in tensors.items():
        renamed, pattern = transform.rename_source_key(name)
        if pattern is None:
            raise ValueError(f"no conversion leads on from {name}")
        first = first or renamed
        transform.add_tensor(renamed, name, pattern, tensor)
    found: Any = transform.convert(first, model=hf, config=hf.config)
    # The first releases of transformers 5 give a list of errors beside it.
    made: dict[str, Any] = found[0] if isinstance(found, tuple) else found
    return made


def _in_model(name: str, present: Mapping[str, bool], prefix: str) -> str:
    for spelling in (name, prefix + name, name.removeprefix(prefix)):
        if spelling in present:
            return spelling
    raise ValueError(f"the model has no {name}, which a conversion of its files makes")


def _conversions(hf: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Those that the model was loaded with; of a model on meta those that it would be."""
    used = getattr(hf, "_weight_conversions", None)
    found = deepcopy(used) if used is not None else get_model_conversion_mapping(hf)
    return (
        [entry for entry in found if isinstance(entry, WeightRenaming)],
        [entry for entry in found if isinstance(entry, WeightConverter)],
    )


def _renamed(key: str, renamings: list[WeightRenaming]) -> str:
    name: str = rename_source_key(key, renamings, [])[0]
    return name


def _on_paper(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _original_name(path: str) -> str:
    if path.endswith(TRAINED_SUFFIX):
        return path.removesuffix(TRAINED_SUFFIX)
    return path.removesuffix(".subspace") + ".weight"


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in hidden]
