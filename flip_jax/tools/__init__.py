"""The commands of `flip`, one module each; `python -m flip_jax NAME` is the same as `flip NAME`.

A command's module has a docstring (shown by `flip NAME --help`), `EXAMPLE`, `add_arguments(parser)` and
`main(arguments)`, which returns the exit code or None for 0.
"""

COMMANDS: dict[str, str] = {
    "aot": "compile a recipe's training step for hardware you do not have: memory, collectives, bounds",
    "card": "write a model card: README.md for the Hugging Face hub and card.json",
    "check": "check that a run's checkpoints are whole",
    "convert": "convert models from and to the hub, transformers, open_clip and ONNX, and from the official code",
    "demo": "serve a web page to try a model on your own images",
    "embed": "write the embeddings of a data set's images or captions to Parquet files",
    "evaluate": "run zero-shot, retrieval, linear-probe and other evaluations",
    "inspect": "report what a data set holds: bad records, image sizes, caption lengths",
    "merge": "interpolate the weights of two models, and evaluate the mixtures",
    "prepare": "write a data set as evenly filled, shuffled webdataset shards",
    "push": "upload a converted model with its card to the Hugging Face hub",
    "report": "draw a run's loss and its images ranked for text queries",
    "search": "find the embeddings nearest to a text or an image",
}
