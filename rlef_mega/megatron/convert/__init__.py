"""Checkpoints to Hugging Face folders and back, on a CPU, in bounded memory, without a model.

`to_hf` and `from_hf` plan files, `job` writes them and survives a kill, `verify` compares both
sides. `weights` is where the sides meet: a range of rows of a tensor under its Hugging Face name,
read from `stored_network` (Megatron's torch_dist format) or `safetensors_files`. Which rows of
which parameter a tensor is says the one name map, `rlef_mega.megatron.hf_names`. docs/conversion.md
is the user's view.
"""
