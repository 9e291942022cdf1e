"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, perhaps more than once."""

from __future__ import annotations


def register() -> None:
    """Make HeedForCausalLM known: its config to transformers (by importing `lm`), its model to vLLM by name, so that
    nothing touches a GPU before vLLM does."""
    from vllm import ModelRegistry

    import lm.hf  # noqa: F401 - importing it is the registration

    if "HeedForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("HeedForCausalLM", "serve.on_vllm.model:HeedForCausalLM")
