"""Settings of the two commands of `recap pretrain`, beside those that every training has."""

from __future__ import annotations

from dataclasses import dataclass

from recap_hf.training.options import AudioConfig, RunConfig, option, require

CLAP_SIZES = ("tiny", "small", "base")
FROZEN = ("none", "audio", "text")


@dataclass
class ClapPretrainingConfig(AudioConfig):
    """Contrastive training of a CLAP, from scratch or from an existing one."""

    # Model
    clap: str = option(
        "",
        "CLAP checkpoint to fine-tune, or a RECAP checkpoint whose CLAP is ('embedded': the default's); without it, "
        "training starts from scratch",
        group="model",
    )
    size: str = option(
        "tiny",
        "from scratch: tiny (3.9 M parameters), small (13 M) or base (118 M: LAION's but for the vocabulary)",
        group="model",
        choices=list(CLAP_SIZES),
    )
    clap_config: str = option("", "from scratch: JSON of a ClapConfig, instead of --size", group="model")
    vocab_size: int = option(
        4096, "from scratch: tokens of the tokenizer that is trained on the captions", group="model"
    )
    freeze: str = option("none", "tower to leave as it is: none, audio or text", group="model", choices=list(FROZEN))

    # Data
    captions_per_clip: int = option(2, "captions of a clip in a step, drawn afresh in each epoch", group="data")
    random_crop: bool = option(
        True, "train on a random window of a longer recording; keyed by seed, epoch and clip", group="data"
    )
    random_gain_db: float = option(0.0, "change the level of a clip by up to so many dB, keyed alike", group="data")
    mask_frames: int = option(0, "hide up to so many frames (10 ms) in a row, at a random place", group="data")
    mask_bins: int = option(0, "hide up to so many mel bins in a row, at a random place", group="data")

    # Optimisation
    learning_rate: float = option(1e-4, "peak learning rate", group="optimisation")
    batch_size: int = option(
        64, "clips in a step, over all processes; each is told from all others", group="optimisation",
        alias=["train_batch_size"],
    )  # fmt: skip
    per_device_train_batch_size: int = option(
        0, "clips in one pass of one process; sets the batch size together with the two below", group="optimisation"
    )
    gradient_accumulation_steps: int = option(
        1,
        "passes of each process in a step; the clips of all are compared, at the price of computing each twice",
        group="optimisation",
    )
    num_train_epochs: float = option(30.0, "passes over the clips", group="optimisation")
    weight_decay: float = option(0.01, "decoupled weight decay (0: plain Adam)", group="optimisation")
    adam_beta2: float = option(0.98, "second decay rate of Adam", group="optimisation")
    warmup_steps: int = option(100, "steps of linear warm-up", group="optimisation", alias=["num_warmup_steps"])
    lr_scheduler_type: str = option(
        "cosine", "schedule of the learning rate, any name of transformers", group="optimisation"
    )
    max_logit_scale: float = option(100.0, "the similarities are multiplied by at most this", group="optimisation")

    # Validation
    eval_batch_size: int = option(
        32, "windows or captions in a validation batch", group="validation", alias=["per_device_eval_batch_size"]
    )
    metric_for_best_model: str = option(
        "map10",
        "figure that picks the best checkpoint and stops the run: map10 (mean of both directions) or loss",
        group="validation",
        choices=["map10", "loss"],
    )

    def validate(self) -> ClapPretrainingConfig:
        """Self, when the settings fit each other.

        Raises:
            ValueError: naming the flag, what it was given and what it takes.
        """
        super().validate()
        require(self.captions_per_clip >= 1, "captions_per_clip", self.captions_per_clip, "at least 1")
        for name in ("random_gain_db", "mask_frames", "mask_bins"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.max_logit_scale > 1, "max_logit_scale", self.max_logit_scale, "more than 1")
        require(self.vocab_size >= 300, "vocab_size", self.vocab_size, "at least 300 (256 bytes and special tokens)")
        if self.clap and self.clap_config:
            raise ValueError("give either --clap (to fine-tune it), or --clap-config (to start from scratch)")
        self.require_dataset()
        return self


@dataclass
class LanguageModelConfig(RunConfig):
    """Training of a GPT-2 on retrieval prompts and captions, from scratch or from an existing one."""

    # Model
    decoder: str = option(
        "",
        "GPT-2 checkpoint to go on from, or a RECAP checkpoint whose GPT-2 is ('embedded': the default's); without "
        "it, training starts from scratch",
        group="model",
    )
    num_layers: int = option(4, "from scratch: layers", group="model")
    width: int = option(192, "from scratch: width of the hidden states", group="model")
    num_heads: int = option(4, "from scratch: heads", group="model")
    max_positions: int = option(512, "from scratch: longest text in tokens", group="model")
    vocab_size: int = option(
        4096, "from scratch: tokens of the tokenizer that is trained on the captions", group="model"
    )
    gradient_checkpointing: bool = option(False, "less memory for more computing", group="model")

    # Prompts
    datastore: str = option(
        "",
        "folder, Hub id or caption file: prompts are the captions nearest to the target (and it is the corpus, where "
        "no --dataset is given)",
        group="prompts",
    )
    clap: str = option(
        "",
        "CLAP checkpoint that embeds the captions, for prompts of nearest captions; without --datastore those of the "
        "training captions. Without both, prompts are the other captions of the same clip",
        group="prompts",
    )
    num_retrieved: int = option(4, "k, captions in the prompt", group="prompts", alias=["k"])
    draw_from: int = option(
        0, "draw the k captions of each epoch from so many nearest (0: the k nearest)", group="prompts"
    )
    shuffle_prompt: bool = option(False, "put the captions of a prompt in random order", group="prompts")
    prompt_dropout: float = option(0.1, "share of examples without captions in their prompt", group="prompts")
    prompt_weight: float = option(
        0.1, "weight of a prompt's token in the loss, where a caption's has 1", group="prompts"
    )

    # Optimisation
    learning_rate: float = option(5e-4, "peak learning rate", group="optimisation")
    num_train_epochs: float = option(10.0, "passes over the captions", group="optimisation")
    weight_decay: float = option(0.01, "decoupled weight decay (0: plain Adam)", group="optimisation")
    adam_beta2: float = option(0.98, "second decay rate of Adam", group="optimisation")
    warmup_steps: int = option(100, "steps of linear warm-up", group="optimisation", alias=["num_warmup_steps"])
    lr_scheduler_type: str = option(
        "cosine", "schedule of the learning rate, any name of transformers", group="optimisation"
    )
    max_caption_tokens: int = option(60, "captions are cut after so many tokens", group="optimisation")
    group_by_length: bool = option(True, "batches of similar lengths, so that little is padded", group="optimisation")

    # Validation
    metric_for_best_model: str = option(
        "perplexity",
        "figure that picks the best checkpoint and stops the run: perplexity (of captions behind their prompts)",
        group="validation",
        choices=["perplexity"],
    )

    def validate(self) -> LanguageModelConfig:
        """Self, when the settings fit each other.

        Raises:
            ValueError: naming the flag, what it was given and what it takes.
        """
        super().validate()
        for name in ("num_layers", "num_heads", "max_caption_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_retrieved", "draw_from", "prompt_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.prompt_dropout < 1, "prompt_dropout", self.prompt_dropout, "at least 0 and less than 1")
        require(
            self.draw_from == 0 or self.draw_from >= self.num_retrieved,
            "draw_from",
            self.draw_from,
            f"0, or at least --num-retrieved ({self.num_retrieved})",
        )
        require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of --num-heads ({self.num_heads})")
        smallest = 2 * self.max_caption_tokens
        require(self.max_positions >= smallest, "max_positions", self.max_positions, f"at least {smallest}")
        require(self.vocab_size >= 300, "vocab_size", self.vocab_size, "at least 300 (256 bytes and special tokens)")
        if not self.datastore:
            self.require_dataset()
        return self


__all__ = ["CLAP_SIZES", "FROZEN", "ClapPretrainingConfig", "LanguageModelConfig"]
