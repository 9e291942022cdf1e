"""Real vLLM on the same folder: `python -m serve FOLDER --engine vllm`.

`checks.py` says whether a folder can run there, `flags.py` turns our flags into vLLM's, `launch.py` becomes
`vllm serve`. Inside vLLM, `plugin.py` registers our own decoder and `model.py` is that decoder in vLLM's layers; these
two import `lm`, torch and vLLM alone, so that `pip install --no-deps` of this package in vLLM's environment is enough.
"""
