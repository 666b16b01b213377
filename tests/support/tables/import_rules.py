"""Which folder of the package may import which; ``tests/unit/test_architecture.py`` checks it.

``MAY_IMPORT`` is the one place where the import rules are written down. A new arrow between two
folders is a decision: add it here in the same commit, and say why.
"""

TOKENIZERS = {"tokenizer", "tokenizer/common", "tokenizer/image", "tokenizer/text"}
DOCUMENTS = {"data/documents", "data/inputs", "images"}

MAY_IMPORT: dict[str, set[str]] = {
    "config": {"config/reading"},
    # YAML and overrides as plain values; it does not know which keys there are
    "config/reading": set(),
    "config/checks": {"config", "schedules"},
    "schedules": {"config"},
    "parallel": {"config"},
    # adapters' shapes, from the table of their names, which needs no torch
    "planner": {"checkpoint/names", "config", "config/checks", "schedules"},
    "images": set(),
    "tokenizer/common": set(),
    "tokenizer/image": {"config", "images", "tokenizer/common", "tokenizer/image/quantizers"},
    "tokenizer/image/quantizers": set(),
    # weights are raised of what is trained on
    "tokenizer/image/faces": {"images", "tokenizer/image"},
    "tokenizer/image/losses": {"tokenizer/image"},
    # other libraries' networks, which are loaded by name
    "tokenizer/image/others": {"tokenizer/image"},
    "tokenizer/image/training": {
        "images",
        "parallel",  # several processes share a batch
        "tokenizer/common",
        "tokenizer/image",
        "tokenizer/image/faces",
        "tokenizer/image/losses",
        "tokenizer/image/quantizers",
        "tokenizer/image/training/records",
    },
    # the page of a training has the look of all pages
    "tokenizer/image/training/records": {"images", "pages", "tokenizer/image"},
    "tokenizer/text": {"tokenizer/common", "tokenizer/image"},
    "tokenizer": {"tokenizer/common", "tokenizer/image", "tokenizer/text"},
    "data": set(),
    "data/inputs/decoding": set(),
    "data/inputs": {"data/inputs/decoding"},
    "data/documents": {"data/inputs", "data/inputs/decoding", "images"},
    # files of other programs name no images: they are found by the ids of the vocabulary
    "data/token_files": {"tokenizer", "tokenizer/common"},
    "data/tokenizer_corpus": {"data/documents", "data/inputs", "images"},
    # loose pictures and texts become records, which are read as all others
    "data/loose": {"data/documents", "data/inputs"},
    # processes that take blocks of records; what they do with them is the caller's
    "data/workers": {"data/inputs"},
    "data/preprocess": {*DOCUMENTS, "data/token_files", "data/workers", "parallel"} | TOKENIZERS,
    # which documents are worth training on; its options have the constraints of a config
    "data/filter/measures": {*DOCUMENTS, "config", "tokenizer"},
    "data/filter": {*DOCUMENTS, "data/filter/measures", "data/workers", "pages"},
    "data/mixture": {"config", "data/token_files", "schedules", "tokenizer/common"},
    "data/batches": {"config", "data/mixture", "data/token_files", "tokenizer", "tokenizer/common"},
    # held-out documents are cut, read and collated as those of training, in an order of their own
    "data/validation": {"config", "data/batches", "data/mixture", "data/token_files", "tokenizer"},
    "data/views": {
        "config",  # what a run has read follows from its config
        # a raw input is shown as preprocessing would read it
        "data/documents",
        "data/inputs",
        "pages",
        "data/batches",
        "data/mixture",
        "data/token_files",
        "images",
        "tokenizer",
        "tokenizer/common",
    },
    "model/kernels": set(),
    # adapters have names of their own in every format
    "model": {"checkpoint/names", "config", "config/checks", "parallel"}
    | {"model/kernels", "model/quantized"},
    # frozen linear layers in 4 bits
    "model/quantized": {"parallel"},
    # Patterns of tensor names choose what is trained, and the names are those of the name table.
    "model/tuning": {"checkpoint/names", "config", "model", "model/quantized"},
    "checkpoint": set(),
    "checkpoint/names": {"config"},
    "checkpoint/tensor_files": set(),
    "checkpoint/state": {"checkpoint/names", "checkpoint/tensor_files", "config", "config/checks"}
    | {"parallel"},
    # Lists a run's checkpoints and compares its config with the defaults; no tensor is read.
    "runs": {"checkpoint/state", "config", "config/reading"},
    "runs/answers": {"checkpoint/state", "runs"},
    # The look of all HTML pages; it knows nothing of what they show.
    "pages": set(),
    # Samples are decoded as other people's images are, and the audit says what was read.
    "reports": {
        "checkpoint/state",
        "config",
        "data/views",
        "images",
        "pages",
        "runs",
        "runs/answers",
    },
    # the adapters of our checkpoints and of peft's folders; formats adds them to weights
    "checkpoint/adapters": {"checkpoint/names", "checkpoint/state", "checkpoint/tensor_files"}
    | {"config"},
    "checkpoint/formats": {
        "checkpoint/adapters",
        "checkpoint/names",
        "checkpoint/state",
        "checkpoint/tensor_files",
        "config",
        "config/reading",
    }
    | TOKENIZERS,
    # a checkpoint of any format in the model of training, to measure it and to answer with it
    "checkpoint/loading": {
        "checkpoint/adapters",
        "checkpoint/formats",
        "checkpoint/names",
        "checkpoint/state",
        "config",
        "model",
        "model/quantized",
        "model/tuning",
        "parallel",
        "tokenizer",
        "tokenizer/common",
    },
    "checkpoint/convert": {
        "checkpoint/adapters",
        "checkpoint/names",
        "checkpoint/formats",
        "checkpoint/loading",
        "checkpoint/state",
        "checkpoint/tensor_files",
        "config",
        "tokenizer",
        "tokenizer/common",
    },
    # an answer is read with all of the tokenizer: its texts, its images, and what a token id means;
    # images/png.py writes images as files, here and wherever one is shown
    "inference/answers": {"images", "tokenizer", "tokenizer/common", "tokenizer/text"},
    "inference/engine": {"tokenizer/common"},
    # graphs of its steps are recorded by parallel
    "inference/engine/batching": {"inference/engine", "parallel", "tokenizer/common"},
    # a conversation in the terminal, without the verb that opens it
    "inference/terminal": {
        "data/documents",
        "images",
        "inference",
        "inference/answers",
        "inference/engine",
        "tokenizer/text",
    },
    # the trained model answers, at any tensor parallelism and from any checkpoint
    "inference/models": {
        "checkpoint/formats",
        "checkpoint/loading",
        "inference/engine",
        "inference/engine/batching",
        "model",
        "parallel",
        "tokenizer",
    },
    "inference": {
        "checkpoint/formats",
        "checkpoint/loading",
        "data/documents",
        "images",
        "inference/answers",
        "inference/engine",
        "inference/engine/batching",
        "inference/models",
        "parallel",
        "tokenizer",
        "tokenizer/common",
        "tokenizer/image",
    },
    # What clients send is read without knowing the model, but for its vocabulary.
    # What vLLM's own processes load: the rules are the same as the decoder's.
    # how many codes an image has, whatever its network is
    "inference/vllm/plugins": {"inference/engine", "tokenizer", "tokenizer/common"},
    "inference/vllm": {
        "checkpoint/formats",
        "inference/engine",
        "inference/vllm/plugins",
        "tokenizer",
        "tokenizer/common",
    },
    "inference/serving/requests": {
        "data/documents",
        "images",
        "inference/engine",
        "tokenizer/common",
    },
    "inference/serving/network": {"inference/serving/requests", "pages"},
    "inference/serving": {
        "data/documents",
        "images",
        "inference",
        "inference/answers",
        "inference/engine",
        "inference/engine/batching",
        "inference/serving/network",
        "inference/serving/requests",
        "inference/vllm",
        "parallel",
        "tokenizer",
    },
    "evaluation/asking": {"data/documents", "inference", "inference/engine"},
    "evaluation/tasks": {
        "data/documents",
        "evaluation/asking",
        "images",
        "inference",
        "inference/engine",
    },
    "evaluation/human": {
        "data/documents",
        "evaluation/asking",
        "images",
        "inference",
        "inference/answers",
        "inference/engine",
        "pages",
    },
    "evaluation": {
        "evaluation/asking",
        "evaluation/human",  # intervals of shares
        "evaluation/tasks",
        "images",
        "inference",
        "pages",
        "runs",
    },
    # the loss on pairs of answers, which engines minimise and metrics take means of
    "training/preference": {"config", "data/batches"},
    # what the model gives to all pairs before its first step, measured as held-out documents are
    "training/reference": {"checkpoint/state", "config", "data/batches", "data/mixture"}
    | {"data/validation", "parallel", "training/engines", "training/preference", "training/run"},
    "training/metrics": {"config", "data/batches", "parallel", "runs", "training/preference"},
    "training/records": {"checkpoint/state", "config", "config/checks", "runs"},
    "training/run": {
        "checkpoint/formats",  # the weights of any format that a run begins with
        "checkpoint/state",
        "config",
        "config/checks",
        "data/batches",
        "data/validation",
        "parallel",
        "planner",
        "runs",
        "runs/answers",
        "tokenizer",
        "training/metrics",
        "training/records",
    },
    "training/engines": {
        "checkpoint/formats",
        "checkpoint/loading",
        "checkpoint/names",
        "checkpoint/state",
        "config",
        "data/batches",
        "model",
        "model/tuning",
        "parallel",
        "schedules",
        "training/metrics",
        "training/preference",
        "training/run",
    },
    "training/faults": {
        "checkpoint/state",
        "data/batches",
        "model",
        "parallel",
        "training/engines",
        "training/metrics",
        "training/records",
        "training/run",
    },
    # looks at data as preprocess reads it, and writes the configs of a run
    "starter/looking": DOCUMENTS | {"data/loose", "data/preprocess"},
    "starter/writing": {"config", "tokenizer/image"},
    "starter": {"config", "data/filter/measures", "data/preprocess", "parallel", "planner"}
    | {"starter/looking", "starter/writing", "tokenizer/image", "tokenizer/text"},
    "training/validation": {
        "checkpoint/formats",
        "checkpoint/loading",
        "checkpoint/names",
        "config",
        "config/checks",
        "data/batches",
        "data/validation",
        "parallel",
        "training/engines",
        "training/faults",
        "training/preference",
        "training/reference",  # pairs are measured against the reference that their run has kept
        "data/token_files",  # whether they hold pairs
    },
    # a model answers prompts of held-out conversations, in training and as a checkpoint
    "training/modalities": {
        "checkpoint/state",
        "config",
        "data/mixture",
        "data/validation",
        "inference",
        "inference/answers",
        "inference/engine",
        "runs/answers",
        "tokenizer",
        "training/samples",
    },
    # the model that is being trained answers, as one that is served does
    "training/samples": {
        "checkpoint/state",
        "config",
        "data/documents",
        "inference",
        "inference/answers",
        "inference/engine",
        "inference/engine/batching",
        "inference/models",
        "pages",
        "parallel",
        "reports",  # the page of the samples is a section of the report
        "runs/answers",
        "tokenizer",
        "tokenizer/common",
    },
    "training": {
        "checkpoint/formats",  # the weights that a run inherits its architecture from
        "checkpoint/loading",
        "checkpoint/state",
        "config",
        "config/checks",
        "data/batches",
        "data/mixture",
        "data/validation",
        "data/views",  # the page of a dry run shows the mixture as inspect does
        "model",
        "model/tuning",
        "pages",
        "parallel",
        "planner",
        "schedules",
        "tokenizer",
        "training/engines",
        "training/faults",
        "training/metrics",
        "training/modalities",
        "training/records",
        "training/reference",
        "training/run",
        "training/samples",
        "training/validation",
    },
}
"""Folder of the package -> the folders that its files may import.

``cli`` may import everything, and nothing imports ``cli``.
"""

FOR_ALL = {
    "announce.py",
    "errors.py",
    "files.py",
    "machine.py",
    "masking.py",
    "json_text.py",
    "outputs.py",
    "terminal.py",
    "values.py",
    "wording.py",
}
"""Files that every folder may import."""
