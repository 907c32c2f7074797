"""Arguments of the training scripts, named as in transformers' image-classification example."""

from __future__ import annotations

from dataclasses import dataclass, field


def _field(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = _field(None, "Checkpoint to start from: a folder or a Hub id.")
    preset: str | None = _field(None, "Published shape to start from scratch, such as DiT-S/2.")
    config_overrides: str | None = _field(
        None, "Config fields for a model from scratch: 'hidden_size=144,num_hidden_layers=7,patch_size=4'."
    )
    attn_implementation: str = _field(
        "sdpa", "Attention: sdpa, eager (fastest for tiny models on CPU), flash_attention_2."
    )


@dataclass
class DataArguments:
    dataset_name: str | None = _field(None, "Data set on the Hub, a folder of parquet files, or 'sample'.")
    dataset_config_name: str | None = _field(None, "Configuration of the data set.")
    train_dir: str | None = _field(None, "Folder of images, in place of dataset_name.")
    train_split: str = _field("train", "Split to train on.")
    image_column_name: str = _field("image", "Column with the images.")
    label_column_name: str = _field("label", "Column with the class labels, for a class-conditional model.")
    max_train_samples: int | None = _field(None, "Use only the first so many training images.")
    random_flip: bool = _field(True, "Flip half of the training images horizontally.")
    dataloader_num_workers: int = _field(0, "Worker processes that decode images.")


@dataclass
class TrainingArguments:
    output_dir: str = _field("", "Folder for checkpoints and the final model.")
    per_device_train_batch_size: int = _field(64, "Images per device and forward pass.")
    gradient_accumulation_steps: int = _field(1, "Forward passes per optimizer step.")
    learning_rate: float = _field(1e-4, "Peak learning rate of AdamW.")
    weight_decay: float = _field(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = _field(1.0, "Gradient clipping.")
    num_train_epochs: int = _field(10, "Passes over the training data.")
    max_train_steps: int | None = _field(None, "Optimizer steps; overrides num_train_epochs.")
    lr_scheduler_type: str = _field("cosine", "A scheduler name of transformers.get_scheduler.")
    num_warmup_steps: int = _field(0, "Steps of linear warm-up.")
    mixed_precision: str = _field("no", "no, fp16 or bf16.")
    ema_decay: float = _field(0.0, "Decay of the weight average that is saved; 0 saves the weights themselves.")
    condition_dropout: float = _field(0.1, "Share of class labels replaced by the null class in training.")
    seed: int = _field(0, "Seed of initialisation, order, flips, timesteps and noise.")
    logging_steps: int = _field(50, "Steps between log lines.")
    checkpointing_steps: int | None = _field(None, "Steps between checkpoints; default: only the final model.")
    checkpoints_total_limit: int = _field(2, "Checkpoints to keep.")
    resume_from_checkpoint: str | None = _field(None, "A checkpoint folder, or 'latest'.")
    report_to: str | None = _field(None, "Tracker: tensorboard, wandb, trackio, ...")
