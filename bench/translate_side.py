"""One side of bench/translate_speed.py: a process that holds one engine, and translates when it is told to.

    python bench/translate_side.py SIDE FOLDER THREADS DTYPE

reads one JSON request a line from standard input, {"sources": [[id, ...], ...], "beam": 4, "tokens": 25}, and answers
with one line, {"seconds": ..., "outputs": [[id, ...], ...]}; first of all it names its version. Exactly `tokens` tokens
are decoded for each source. The file stands alone, for CTranslate2 lives in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Translate = Callable[[list[list[int]], int, int], list[list[int]]]


def heed(folder: Path, threads: int, dtype: str) -> tuple[str, Translate]:
    import torch

    from lm import __version__, pretrained
    from lm.beam import BeamParams, beam_search

    torch.set_num_threads(threads)
    model = pretrained.load(folder, getattr(torch, dtype))
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]

    def translate(sources: list[list[int]], beam: int, tokens: int) -> list[list[int]]:
        params = BeamParams(beam=beam, min_tokens=tokens, max_tokens=tokens)
        return [hypotheses[0].ids for hypotheses in beam_search(model, sources, params, [end])]

    return f"heed {__version__}, torch {torch.__version__}", translate


def transformers(folder: Path, threads: int, dtype: str) -> tuple[str, Translate]:
    """The same weights as a MarianMT: post-norm too, its sinusoids replaced by the paper's order of them."""
    import torch
    import transformers as library
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    config, weights = read(folder, load_file)
    marian = library.MarianConfig(
        vocab_size=config["vocab_size"],
        d_model=config["width"],
        encoder_layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        encoder_attention_heads=config["heads"],
        decoder_attention_heads=config["heads"],
        encoder_ffn_dim=config["mlp_width"],
        decoder_ffn_dim=config["mlp_width"],
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=config["context"],
        pad_token_id=config["pad_token_id"],
        eos_token_id=config["eos_token_id"],
        bos_token_id=config["bos_token_id"],
        decoder_start_token_id=config["decoder_start_token_id"],
        forced_eos_token_id=None,
    )
    library.logging.set_verbosity_error()
    model = library.MarianMTModel(marian).eval()
    names = {"mlp.up_proj": "fc1", "mlp.down_proj": "fc2", "mlp_norm": "final_layer_norm"}
    names |= {"self_attn_norm": "self_attn_layer_norm", "cross_attn_norm": "encoder_attn_layer_norm"}
    names |= {"cross_attn.": "encoder_attn.", "o_proj": "out_proj"}
    table = torch.tensor(sinusoids(config["context"], config["width"]))
    own = {"final_logits_bias": torch.zeros(1, config["vocab_size"]), "lm_head.weight": weights["embed_tokens.weight"]}
    for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        own[f"model.{name}.weight"] = weights["embed_tokens.weight"]
    own |= {f"model.{stack}.embed_positions.weight": table for stack in ("encoder", "decoder")}
    for name, tensor in weights.items():
        if ".layers." in name:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            own[f"model.{name}"] = tensor
    model.load_state_dict(own, strict=True)
    model.to(getattr(torch, dtype))

    def translate(sources: list[list[int]], beam: int, tokens: int) -> list[list[int]]:
        longest = max(map(len, sources))
        pad = config["pad_token_id"]
        ids = torch.tensor([source + [pad] * (longest - len(source)) for source in sources])
        mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in sources])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_beams=beam,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
        return out[:, 1:].tolist()

    return f"transformers {library.__version__}, torch {torch.__version__}", translate


def ctranslate2(folder: Path, threads: int, dtype: str) -> tuple[str, Translate]:
    import ctranslate2 as library
    import numpy as np
    from safetensors.numpy import load_file

    config, weights = read(folder, load_file)
    layers = (config["encoder_layers"], config["decoder_layers"])
    relu = library.specs.Activation.RELU
    spec = library.specs.TransformerSpec.from_config(layers, config["heads"], pre_norm=False, activation=relu)
    table = sinusoids(config["context"], config["width"])

    def linear(target: Any, *sources: str) -> None:
        target.weight = np.concatenate([weights[f"{source}.weight"] for source in sources])
        target.bias = np.concatenate([weights[f"{source}.bias"] for source in sources])

    def norm(target: Any, source: str) -> None:
        target.gamma, target.beta = weights[f"{source}.weight"], weights[f"{source}.bias"]

    for stack, side in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        embeddings = side.embeddings[0] if stack == "encoder" else side.embeddings
        embeddings.weight = weights["embed_tokens.weight"]
        side.scale_embeddings = True
        side.position_encodings.encodings = np.array(table, dtype=np.float32)
        for number, layer in enumerate(side.layer):
            at = f"{stack}.layers.{number}"
            maps = [f"{at}.self_attn.{letter}_proj" for letter in "qkv"]
            linear(layer.self_attention.linear[0], *maps)
            linear(layer.self_attention.linear[1], f"{at}.self_attn.o_proj")
            norm(layer.self_attention.layer_norm, f"{at}.self_attn_norm")
            if stack == "decoder":
                linear(layer.attention.linear[0], f"{at}.cross_attn.q_proj")
                linear(layer.attention.linear[1], f"{at}.cross_attn.k_proj", f"{at}.cross_attn.v_proj")
                linear(layer.attention.linear[2], f"{at}.cross_attn.o_proj")
                norm(layer.attention.layer_norm, f"{at}.cross_attn_norm")
            linear(layer.ffn.linear_0, f"{at}.mlp.up_proj")
            linear(layer.ffn.linear_1, f"{at}.mlp.down_proj")
            norm(layer.ffn.layer_norm, f"{at}.mlp_norm")
    spec.decoder.projection.weight = weights["embed_tokens.weight"]
    vocabulary = [str(id) for id in range(config["vocab_size"])]
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    spec.config.decoder_start_token = str(config["decoder_start_token_id"])
    spec.config.bos_token, spec.config.eos_token = str(config["bos_token_id"]), str(config["eos_token_id"])
    spec.config.unk_token = str(config["pad_token_id"])  # it must have one
    spec.config.add_source_eos = spec.config.add_source_bos = False
    spec.validate()
    spec.optimize()
    target = folder / f"ctranslate2-{dtype}"
    target.mkdir(exist_ok=True)
    spec.save(str(target))
    translator = library.Translator(
        str(target), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=threads
    )
    if translator.compute_type != dtype:  # it takes another where the machine has none of this
        sys.exit(f"CTranslate2 computes in {translator.compute_type} here, not in {dtype}.")

    def translate(sources: list[list[int]], beam: int, tokens: int) -> list[list[int]]:
        found = translator.translate_batch(
            [[str(id) for id in source] for source in sources],
            beam_size=beam,
            min_decoding_length=tokens,
            max_decoding_length=tokens,
        )
        return [[int(token) for token in one.hypotheses[0]] for one in found]

    return f"CTranslate2 {library.__version__}", translate


def products(folder: Path, threads: int, dtype: str) -> tuple[str, Translate]:
    """Not a translator: only the matrix products that one of this shape cannot do without, as fast as oneDNN does them.

    The encoder's over the real source tokens, cross-attention's keys and values once a source, and for every token and
    hypothesis the decoder's. What this takes, nobody undercuts in this dtype on this machine.
    """
    import torch

    torch.set_num_threads(threads)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width, inner, vocabulary = config["width"], config["mlp_width"], config["vocab_size"]
    feed_forward = [(inner, width), (width, inner)]
    encoder = [(3 * width, width), (width, width), *feed_forward]
    decoder = [(3 * width, width), (width, width), (width, width), (width, width), *feed_forward]

    def draw(*shape: int) -> Any:
        return torch.randn(shape).to(getattr(torch, dtype))

    # Each layer has weights of its own: they come from memory as they do in a translator.
    read_source = [draw(*shape) for _ in range(config["encoder_layers"]) for shape in encoder]
    read_source += [draw(2 * width, width) for _ in range(config["decoder_layers"])]
    write_token = [draw(*shape) for _ in range(config["decoder_layers"]) for shape in decoder]
    write_token.append(draw(vocabulary, width))
    ready: dict[tuple[int, int], list[tuple[Any, Any]]] = {}

    def multiply(weights: list[Any], rows: int) -> None:
        if (id(weights), rows) not in ready:
            inputs = {size: draw(rows, size) for size in {weight.shape[1] for weight in weights}}
            ready[id(weights), rows] = [
                (inputs[weight.shape[1]], torch.ops.mkldnn._reorder_linear_weight(weight, rows)) for weight in weights
            ]
        for x, weight in ready[id(weights), rows]:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    def translate(sources: list[list[int]], beam: int, tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            multiply(read_source, sum(map(len, sources)))
            multiply(write_token, len(sources))
            for _ in range(tokens - 1):
                multiply(write_token, len(sources) * beam)
        return [[0] * tokens for _ in sources]

    return "matrix products alone", translate


def read(folder: Path, load_file: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The folder's config, and its weights by the names that the modules have."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def sinusoids(length: int, width: int) -> list[list[float]]:
    """The paper's table (arXiv 1706.03762, section 3.5), sines and cosines in turn."""
    import math

    rates = [10000 ** -(2 * (i // 2) / width) for i in range(width)]
    return [[math.cos(p * r) if i % 2 else math.sin(p * r) for i, r in enumerate(rates)] for p in range(length)]


def main() -> None:
    side, folder, threads, dtype = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sides = {"heed": heed, "transformers": transformers, "CTranslate2": ctranslate2, "products alone": products}
    version, translate = sides[side](folder, threads, dtype)
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        outputs = translate(request["sources"], request["beam"], request["tokens"])
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "outputs": outputs}), flush=True)


if __name__ == "__main__":
    main()
