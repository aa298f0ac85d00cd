"""A real engine on asyncexec, and the model for other engine authors; it uses asyncexec's public API alone.

The engine's side runs in your process: `engine` (token streams), `scheduler` (which requests run in a step), `blocks`
(the KV cache's free blocks) and `tokenizer`.  The model's side, a Llama decoder, runs on every rank: `worker`, `llama`,
`attention`, `rope`, `parallel`, `sampler` and `checkpoint`.  Between them travel `messages`.  The command `asyncexec
demo` is `command`, `display` and `summary`.  `train` and `random_checkpoint` make checkpoints, and `tiny` is one.
"""
