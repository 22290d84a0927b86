"""Checkpoints to Hugging Face folders and back, on a CPU, in bounded memory, without a model.

`to_hf` and `from_hf` plan files, `resumable_folder` writes them and survives a kill, `verify`
compares the result with its source. Both sides answer the same request, a range of rows of a tensor
under its Hugging Face name (`weights`): a checkpoint in `stored_network`, a folder in
`safetensors_files`. The one name map (`rlef_mega.megatron.hf_names`) gives the rows of the
parameter that are a tensor. docs/conversion.md is the user's view.
"""
