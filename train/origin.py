"""`model.from`: a run that begins with the weights of a model folder, ours or another's.

The folder decides the shape and the tokenizer; a recipe may shorten the context that is trained on and set dropout. The
trained model keeps the folder's longest context, its vocabulary (which may be padded beyond the tokenizer's) and its
chat template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.schema import RecipeError, show

if TYPE_CHECKING:
    from lm.config import DecoderConfig
    from lm.decoder import DecoderLM
    from lm.tokenizer import Tokenizer
    from train.config import Recipe

OWN_KEYS = ("from", "context", "dropout")  # of the model section: what the folder does not decide


def complete(flat: dict[str, Any], problems: list[str]) -> DecoderConfig | None:
    """Put the shape and the tokenizer of the folder that `flat` (`section.key: value`) names under model.from into it.

    Returns the folder's decoder. None, with a sentence in `problems`, where it cannot be read; where model.from is no
    text, that is said elsewhere.
    """
    folder = flat["model.from"]
    problems += _not_to_be_given(folder, flat)
    flat.update({"tokenizer.kind": "folder", "tokenizer.folder": str(folder), "tokenizer.vocab_size": None})
    if not isinstance(folder, str):
        return None
    from lm import pretrained  # torch, which a recipe without model.from does not need

    try:
        start = pretrained.read_config(folder, only="decoder")
    except pretrained.FolderError as error:
        problems.append(f"model.from is {show(folder)}: {error}")
        return None
    shape = {f"model.{key}": value for key, value in dataclasses.asdict(start).items() if key not in OWN_KEYS}
    del shape["model.vocab_size"]
    flat.update(shape)
    flat.setdefault("model.context", start.context)
    return start


def check(start: DecoderConfig, v: Mapping[str, Any], bad: set[str], problems: list[str]) -> None:
    """Add a sentence for each rule between model.from and the other keys' values that is broken."""
    folder = v["model.from"]
    if "model.context" not in bad and v["model.context"] > start.context:
        problems.append(
            f"model.context is {v['model.context']}; it must be at most that of model.from, which is {start.context}."
        )
    if "run.dir" not in bad and Path(folder).resolve().is_relative_to(Path(v["run.dir"]).resolve()):
        problems.append(
            f"model.from is {show(folder)}, which lies in run.dir, and the run would write over it; give another "
            "run.dir."
        )


def load(recipe: Recipe) -> DecoderLM:
    """The model in model.from with its weights in fp32, ready to be trained. Raises RecipeError."""
    import torch

    from lm import pretrained

    folder = recipe.model.from_
    assert folder is not None
    try:
        model = pretrained.load(folder, torch.float32)
    except pretrained.FolderError as error:
        raise RecipeError([f"model.from is {show(folder)}: {error}"]) from None
    model.config = recipe.decoder_config(model.config.vocab_size)
    for block in model.layers:
        block.dropout = recipe.model.dropout  # type: ignore[assignment]
    return model.train()


def kept(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """What lm.pretrained.save is told so that a folder of the trained model is what model.from's was: its family, and
    how it generates (several ids that end a text, a temperature)."""
    from lm import pretrained

    folder = recipe.model.from_
    if folder is None:
        return {}
    try:
        generation = pretrained.read_generation(folder)
        if len(stops := pretrained.stop_ids(folder, tokenizer)) > 1:
            generation["eos_token_id"] = stops
        return {"architecture": pretrained.read_architecture(folder), "generation": generation}
    except pretrained.FolderError:  # it was there when the run began; what has been trained is worth more
        return {}


def _not_to_be_given(folder: Any, flat: Mapping[str, Any]) -> list[str]:
    """What the recipe says although the folder decides it."""
    problems = []
    own = {f"model.{key}" for key in OWN_KEYS}
    given = [key for key in flat if key.startswith("model.") and key not in own]
    if given:
        problems.append(
            f"model.from is {show(folder)}, and that folder decides the model's shape; leave out {', '.join(given)}."
        )
    kind, other = flat.get("tokenizer.kind"), flat.get("tokenizer.folder")
    belongs = f"model.from is {show(folder)}, and the tokenizer is that folder's"
    if kind not in (None, "folder"):
        problems.append(f"tokenizer.kind is {show(kind)}; {belongs}: leave the tokenizer section out.")
    elif other is not None and not _same_tokenizer(folder, other):
        problems.append(
            f"tokenizer.folder is {show(other)}; {belongs}, which differs: leave the tokenizer section out."
        )
    return problems


def _same_tokenizer(folder: Any, other: Any) -> bool:
    """Whether `other` names the same folder, or one whose tokenizer gives the same ids."""
    from lm import tokenizer
    from lm.pretrained import FolderError, load_tokenizer

    if not isinstance(folder, str) or not isinstance(other, str):
        return False
    if Path(other).resolve() == Path(folder).resolve():
        return True
    try:
        return tokenizer.Tokenizer.load(other).fingerprint() == load_tokenizer(folder).fingerprint()
    except (tokenizer.TokenizerError, FolderError):
        return False
