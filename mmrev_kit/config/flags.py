"""What people call a setting elsewhere: parameters of the notebooks, flags of the commands, names in other programs."""

# Parameters of notebooks and the configuration keys they stand for; None leaves a key as configured.
PARAMETERS = {
    "task": "experiment.task",
    "name": "experiment.name",
    "seed": "experiment.seed",
    "num_main": "data.num_main",
    "num_control": "data.num_control",
    "learning_rate": "training.learning_rate",
    "num_epochs": "training.num_epochs",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "num_processes": "launch.num_processes",
    "output_dir": "launch.output_dir",
    "overwrite": "launch.overwrite",
}
# The flags of each command and the keys they stand for.
_DATA = {name: PARAMETERS[name] for name in ("name", "seed")} | {"data_dir": "data.folder"}
_POOL = {"face_retention_pool": "retention.face_pool"}
FLAGS = {
    "train": PARAMETERS | _DATA | _POOL | {
        "retention_ratio": "retention.retention_ratio",
        "base_model": "model.name",
        "mode": "launch.mode",
    },
    "evaluate": {
        "data_dir": "data.folder",
        "base_model": "model.name",
        "task": "evaluation.tests",
        "max_samples": "evaluation.max_samples",
        "save_examples": "evaluation.save_examples",
        "device_map": "launch.mode",
        "unbound": "adapter.unbound",
        "num_processes": "launch.num_processes",
        "output_dir": "launch.output_dir",
    },
    "generate-data": _DATA | {name: PARAMETERS[name] for name in ("num_main", "num_control")},
    "generate-face-retention-pool": _POOL | {"num_entities": "retention.num_faces", "seed": "experiment.seed"},
    "memory": {"num_processes": "launch.num_processes"},
    "doctor": {name: PARAMETERS[name] for name in ("task", "name", "num_processes", "output_dir")},
}  # fmt: skip
# Names of settings in the original scripts, transformers, peft and bitsandbytes, where they differ from the kit's.
ELSEWHERE = {
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "data_dir": "data.folder",
    "device_map": "launch.mode=auto, with quantization.bits=16",
    "face_retention_pool": "retention.face_pool",
    "load_in_4bit": "quantization.bits=4",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.r",
    "max_seq_length": "training.max_length",
    "model_name": "model.name",
    "num_entities": "data.num_main",
    "num_train_epochs": "training.num_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "torch_dtype": "quantization.compute_dtype",
}
