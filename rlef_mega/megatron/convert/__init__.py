"""Checkpoints to Hugging Face folders and back, on a CPU, in bounded memory, without a model.

`to_hf` and `from_hf` plan files, `resumable_folder` writes them and survives a kill,
`compare_weights` verifies the result. Both sides answer the same request, a range of rows of a
tensor under its Hugging Face name (`weights`): a checkpoint in `stored_network`, a folder in
`safetensors_files`. Which rows of which parameter a tensor is, the one name map says
(`rlef_mega.megatron.hf_names`). docs/conversion.md is the user's view.
"""
