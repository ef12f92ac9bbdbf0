"""What training starts from: the model, the tokenizer, the data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from rlhf_dist.config.base import Dtype, Fraction, Section


class LoRAConfig(Section):
    """Adapters of low rank beside the frozen policy (2106.09685), in every stage that trains a policy."""

    rank: int = Field(0, ge=0, le=512)
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: PositiveInt | None = None
    """The adapters' output is scaled by alpha / rank; default: twice the rank."""
    dropout: Fraction = 0.0
    """Dropout before the adapters, in training only."""
    serve: Literal["merged", "adapters"] = "merged"
    """How the generators use them. merged: added to the weights, as fast as without. adapters: by vLLM's LoRA kernels
    beside the weights that each generator reads from ``model.path``, without the rounding of a merge."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers to adapt, or all-linear: all but the head."""

    @model_validator(mode="after")
    def _named(self) -> LoRAConfig:
        if self.serve == "adapters" and self.target_modules == "all-linear":
            raise ValueError(
                "serve=adapters needs target_modules as a list, such as [q_proj, v_proj]: vLLM prepares its layers for "
                "adapters before it sees the first"
            )
        return self


class ModelConfig(Section):
    """The policy that training starts from."""

    path: str | None = None
    """Folder or hub name of a Hugging Face model. Empty: build one from ``architecture``, randomly initialised."""
    architecture: dict[str, Any] = {}
    """Keys of the Hugging Face config to build from, with ``model_type``. Vocabulary, special tokens are filled in."""
    tokenizer: str | None = None
    """Folder or hub name; ``model.path`` if not given; else trained on the data (see ``tokenizer_vocab_size``)."""
    tokenizer_vocab_size: PositiveInt = 2048
    """Size of the byte-level BPE that is trained on ``data`` when there is no tokenizer."""
    dtype: Dtype = "float32"
    """Type of weights and activations in every process. Optimizer and gradients stay in float32."""
    attention: str = "sdpa"
    """``attn_implementation`` of transformers: sdpa, eager, flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoRAConfig = Field(default_factory=LoRAConfig)
    """Train adapters instead of all weights."""
    trust_remote_code: bool = False
    """Allow code from the model's repository to run. Off unless you read that code."""


#: Values of ``data.format`` whose rows hold responses that people compared, and those with more than two to a prompt.
COMPARISON_FORMATS = ("world", "hh", "preferences", "rankings", "qa_feedback", "voted")
RANKING_FORMATS = ("world", "rankings", "qa_feedback", "voted")


class DataConfig(Section):
    """Where prompts, demonstrations and comparisons come from."""

    format: Literal[
        "world",
        "hh",
        "messages",
        "instructions",
        "preferences",
        "rankings",
        "qa_feedback",
        "voted",
        "prompts",
        "gsm8k",
    ] = "world"
    """world: the embedded miniature world. hh: `chosen`/`rejected` transcripts. messages: chat JSONL.
    instructions: `instruction`/`input`/`output`. preferences: `prompt`/`chosen`/`rejected`. rankings: `responses`, best
    first. qa_feedback: four `prediction`s with pair labels. voted: `answers` with `votes`. prompts: one `prompt` a row.
    gsm8k: `question`/`answer`."""
    dir: str | None = None
    """Folder of the files below; or ``hub:NAME[:SUBSET]``: the splits train and test of a hub dataset are read then."""
    train: str | None = None
    """Training file in ``dir`` (.jsonl, .jsonl.gz, .json, .parquet, .txt), or dataset ``hub:NAME[:SUBSET[:SPLIT]]``."""
    test: str | None = None
    """Held-out file, same forms. Its prompts are never trained on."""
    pretrain: str | None = None
    """Text for ``algo.ptx_coef``, same forms: one text a line, or rows with ``text``. Default: the demonstrations."""
    chat_template: str | None = None
    """Jinja template; by default the tokenizer's own, or the plain `Human:`/`Assistant:` form of HH."""
    on_bad_row: Literal["skip", "fail"] = "skip"
    """A faulty row is skipped, counted by its fault and reported with file and line, or stops the run."""
    part: Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")] | None = None
    """Train on a part of the rows: 1/2 and 2/2 are two halves that share no prompt. Held-out rows are not divided."""
    max_rows: PositiveInt | None = None
    """Read at most so many rows of each file."""
    shuffle: bool = True
    """Shuffle prompts anew in every epoch, from ``seed``."""
    world: WorldConfig = Field(default_factory=lambda: WorldConfig())
    """Sizes of the embedded world; used by ``format: world`` only."""

    @model_validator(mode="after")
    def _part(self) -> DataConfig:
        if self.part is not None:
            number, of = map(int, self.part.split("/"))
            if number > of:
                raise ValueError(f"part={self.part}: the parts are 1/{of} to {of}/{of}")
            if self.format == "world":
                raise ValueError(f"part={self.part} divides rows of files; the world has no end: give stages a `seed`")
        return self


class WorldConfig(Section):
    """The embedded miniature assistant world."""

    demonstrations: PositiveInt = 24000
    """Imperfect demonstrations for SFT."""
    comparisons: PositiveInt = 8000
    """Preference pairs of responses like the demonstrations, for the reward model."""
    prompts: PositiveInt = 4096
    """Training prompts for PPO."""
    test_prompts: PositiveInt = 512
    """Held-out prompts, with arguments that never occur in training."""
    label_noise: Fraction = 0.1
    """Share of preference labels that are flipped."""
    ranked_responses: Annotated[int, Field(ge=2)] = 4
    """K of ``reward_model.loss: kwise``; ``comparisons`` counts the pairs, K(K-1)/2 for each ranking."""
