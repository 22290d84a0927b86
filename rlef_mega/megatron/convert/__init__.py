"""Convert checkpoints to Hugging Face folders and back, on a CPU, file by file, without a model.

`to_hf` and `from_hf` plan files, `resumable_folder` writes them and survives a kill, `verify`
compares the result with its source. Both sides give whole tensors under their Hugging Face names: a
checkpoint in `stored_network`, a folder in `run/model_folder`. The one name map
(`rlef_mega.megatron.hf_names`) says which rows of a parameter are a tensor. docs/conversion.md is
the user's view.
"""
