"""vLLM: kvselect as the attention of a server's full-attention layers (docs/serving.md).

Nothing here imports vLLM but `shim`; `config`, `state` and `layer` run and are tested without it.
"""
