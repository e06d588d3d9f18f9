"""A masked diffusion language model for transformers, from 4.57 on, as the package `unmask` trains them.

`model(input_ids).logits[:, i]` predicts the token at position i, wherever the network reads that prediction; it is -inf
for the mask, which is no answer. `model.generate(**inputs, max_new_tokens=n)` puts n masks behind each prompt and fills
them in, the surest first; masks inside a prompt are filled in too.

This file is copied beside the weights, needs PyTorch and transformers alone, and reads the settings that the model was
trained with: `run.model` and `tokens` of `config.json`. Dimensions: B rows, L positions, D width, V tokens.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)


class UnmaskConfig(PretrainedConfig):
    """The settings of a run, `run`, and its `tokens`: V, the length of a canvas, the mask, the end."""

    model_type = "unmask"

    def __init__(self, run=None, tokens=None, **others):
        self.run, self.tokens = run or {}, tokens or {}
        model = self.run.get("model", {})
        # Under transformers' names, for tools that ask for them. Whether the head is tied is up to `Backbone`.
        self.vocab_size, self.mask_token_id = self.tokens.get("vocab_size"), self.tokens.get("mask_id")
        self.hidden_size, self.num_hidden_layers = model.get("dim"), model.get("num_layers")
        self.num_attention_heads, self.max_position_embeddings = model.get("num_heads"), self.tokens.get("length")
        super().__init__(**{**others, "tie_word_embeddings": False})


# --- the network -----------------------------------------------------------------------------------------------------


class RmsNorm(nn.RMSNorm):
    """`x / rms(x) * weight`, in fp32."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Attention to the positions that `sees` allows; rotary positions, if there are angles."""

    def __init__(self, model):
        super().__init__()
        self.width = model.head_dim or model.dim // model.num_heads
        inner, shared = model.num_heads * self.width, (model.num_kv_heads or model.num_heads) * self.width
        self.q = nn.Linear(model.dim, inner, bias=model.qkv_bias)
        self.k = nn.Linear(model.dim, shared, bias=model.qkv_bias)
        self.v = nn.Linear(model.dim, shared, bias=model.qkv_bias)
        self.out = nn.Linear(inner, model.dim, bias=model.out_bias)
        self.q_norm = RmsNorm(self.width, eps=model.norm_eps) if model.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(self.width, eps=model.norm_eps) if model.qk_norm else nn.Identity()

    def forward(self, x, angles, sees):
        q, k, v = (part(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """Turns the channel pairs (e, e + E / 2) by their position's angles, of which each channel has its own."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class SwiGlu(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.gate = nn.Linear(model.dim, model.ff_dim, bias=False)
        self.up = nn.Linear(model.dim, model.ff_dim, bias=False)
        self.down = nn.Linear(model.ff_dim, model.dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.attention_norm = RmsNorm(model.dim, eps=model.norm_eps)
        self.attention = Attention(model)
        self.mlp_norm = RmsNorm(model.dim, eps=model.norm_eps)
        self.mlp = SwiGlu(model)

    def forward(self, x, angles, sees):
        x = x + self.attention(self.attention_norm(x), angles, sees)
        return x + self.mlp(self.mlp_norm(x))


class Backbone(nn.Module):
    """A pre-norm transformer from tokens (B, L) to hidden states (B, L, D), whose products with the head are logits."""

    def __init__(self, model, tokens):
        super().__init__()
        self.model = model
        self.block_size = 1 if model.causal else model.block_size
        self.embedding = nn.Embedding(tokens["vocab_size"], model.dim)
        self.positions = nn.Embedding(tokens["length"], model.dim) if model.learned_positions else None
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.norm = RmsNorm(model.dim, eps=model.norm_eps)
        self.head = None if model.tied_head else nn.Linear(model.dim, tokens["vocab_size"], bias=False)

    def forward(self, ids, is_real):
        """Computes hidden states; positions are counted from a row's first real token, and nothing sees padding."""
        place = places(is_real)
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(place)
        sees = None if self.block_size is None and bool(is_real.all()) else is_real[:, None, None, :]
        if self.block_size is not None:  # a block sees itself and those before it
            block = place // self.block_size
            sees = sees & (block[:, None, :, None] >= block[:, None, None, :])
        angles = self._angles(place) if self.model.rotary else None
        for number in self._order():
            x = self.blocks[number](x, angles, sees)
        return self.norm(x)

    def _angles(self, place):
        """Computes cos and sin, (B, 1, L, E), of `place * theta^(-2 e / E)` for the channel pairs e."""
        # Anew in each pass: transformers 5 would leave a table that is made in `__init__` unfilled.
        width, is_reference = self.blocks[0].attention.width, self.model.rotary_layout == "reference"
        exact = {"dtype": torch.float32 if is_reference else torch.float64, "device": "cpu"}
        frequency = self.model.rope_theta ** -(torch.arange(0, width, 2, **exact) / width)
        angle = torch.outer(torch.arange(place.shape[1], **exact), frequency).repeat(1, 2)
        if is_reference:  # the PUMA paper's code: neighbours are a pair, and turn by two angles
            angle = torch.cat([angle[:, 0::2], angle[:, 1::2]], dim=1)
        return [table.float().to(place.device)[place].unsqueeze(1) for table in (angle.cos(), angle.sin())]

    def _order(self):
        """Returns the layers in the order in which a pass runs them: those of `loops` several times."""
        layers = [*range(len(self.blocks))]
        if self.model.loops is None:
            return layers
        first, last = self.model.loops["layers"]
        return layers[:first] + layers[first : last + 1] * self.model.loops["times"][1] + layers[last + 1 :]


def places(is_real):
    """Counts each row's real positions (B, L) from 0."""
    return (is_real.long().cumsum(dim=1) - 1).clamp(min=0)


# --- the model -------------------------------------------------------------------------------------------------------

ORDERS = {
    "prob": lambda log_p, place: log_p.amax(dim=-1).exp(),
    "margin": lambda log_p, place: -log_p.topk(2, dim=-1).values.exp().diff(dim=-1).squeeze(-1),
    "neg_entropy": lambda log_p, place: -torch.special.entr(log_p.exp()).sum(dim=-1),
    "random": lambda log_p, place: torch.rand_like(log_p[:, 0]),
    "left_to_right": lambda log_p, place: -place.to(log_p.dtype),
    "right_to_left": lambda log_p, place: place.to(log_p.dtype),
}
"""Scores of masked positions, by log-probabilities (M, V) and places (M,); the largest are revealed first."""


def chosen(log_p, place, eligible, asked):
    """Returns which positions (B, L) are revealed, of those `eligible`, whose log-probabilities are `log_p` (M, V)."""
    lowest = torch.full(eligible.shape, -torch.inf, dtype=log_p.dtype, device=log_p.device)
    scores = lowest.masked_scatter(eligible, asked.score(log_p, place[eligible]))
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    column = torch.arange(eligible.shape[1], device=log_p.device)
    rank = torch.empty_like(ranked).scatter_(1, ranked, column.expand_as(ranked))
    if asked.threshold is None:
        return eligible & (rank < asked.count)
    is_sure = lowest.masked_scatter(eligible, log_p.amax(dim=-1).exp()) > asked.threshold
    return (eligible & (rank < 1)) | is_sure


def first_threshold(sources):
    """Returns the threshold of the first of `sources` that says how much a step reveals; None: so many tokens."""
    saying = (each for each in sources if each.get("tokens_per_step") or "threshold" in each)
    return next(saying, {}).get("threshold")


class Canvas:
    """The rows (B, L) that are filled in: padding, the prompt, and `new` masks behind it."""

    def __init__(self, ids, attention_mask, new, mask_id):
        is_real = torch.ones_like(ids).bool() if attention_mask is None else attention_mask.bool()
        by_side = is_real.long().argsort(dim=1, stable=True)  # padding goes to the left
        self.xt = F.pad(ids.gather(1, by_side), (0, new), value=mask_id)
        self.is_real = F.pad(is_real.gather(1, by_side), (0, new), value=True)
        self.place = places(self.is_real)
        self.is_masked = (self.xt == mask_id) & self.is_real
        self.column = torch.arange(self.xt.shape[1], device=ids.device)
        self.last_given = torch.where(self.is_masked, -1, self.column).amax(dim=1, keepdim=True)

    def fill(self, at, values):
        """Sets the positions `at`; both (B, L)."""
        self.xt = torch.where(at, values, self.xt)
        self.is_masked = self.is_masked & ~at

    def end(self, ends):
        """Fills what follows the first end token of an answer with the first of `ends`."""
        is_end = torch.isin(self.xt, ends) & (self.column > self.last_given)
        end = torch.where(is_end, self.column, len(self.column)).amin(dim=1, keepdim=True)
        self.fill(self.is_masked & (self.column > end), ends[0])


class UnmaskModel(PreTrainedModel, GenerationMixin):
    config_class = UnmaskConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012 - as transformers asks for it

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Backbone(SimpleNamespace(**config.run["model"]), config.tokens)
        self.mask_id = config.tokens["mask_id"]
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.embedding

    def set_input_embeddings(self, value):
        self.backbone.embedding = value

    def get_output_embeddings(self):
        return self.backbone.head

    def set_output_embeddings(self, value):
        self.backbone.head = value

    def forward(self, input_ids, attention_mask=None, labels=None, **ignored):
        """Returns logits (B, L, V) in fp32, and the mean cross-entropy at `labels` that are not -100."""
        is_real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        logits = self._logits(self._hidden(input_ids, is_real))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)

    def _hidden(self, ids, is_real):
        """Returns the hidden states (B, L, D) that predict each position: with alignment `next`, those before it."""
        hidden = self.backbone(ids, is_real)
        is_next = self.backbone.model.alignment == "next"
        return torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1) if is_next else hidden

    def _logits(self, hidden):
        head = self.backbone.embedding if self.backbone.head is None else self.backbone.head
        is_mask = torch.arange(len(head.weight), device=hidden.device) == self.mask_id
        return F.linear(hidden, head.weight).float().masked_fill(is_mask, -torch.inf)

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, input_ids=None, attention_mask=None, **options):
        """Fills in what is masked: `max_new_tokens` masks behind each prompt, and masks inside it.

        What is not given is that of `generation_config`, or of the file of that name beside the weights.

        Args:
            inputs, input_ids: prompts (B, L).
            attention_mask: 0 at padding, on either side.
            max_new_tokens, max_length: default: up to the length of the canvas that the model was trained with.
            order: what is revealed first, a key of `ORDERS`.
            tokens_per_step: positions revealed in a step; or, in its place,
            threshold: all whose probability exceeds it, and the one of highest score.
            block_size: fills in blocks of so many positions, from left to right; a block model has its own.
            reads_ahead: False: what follows a block is not read.
            do_sample, temperature, top_k, top_p: draws values; default: the likeliest.
            eos_token_id: what follows an end is filled with it; default: where the model was trained to.
            stop_early: False: with no `eos_token_id`, what follows an end is decoded as well.
            options: of others' `generate`, such as `use_cache`, are ignored with a warning.

        Returns:
            (B, L + new): padding, which comes first, prompt and answer.
        """

        ids = inputs if input_ids is None else input_ids
        asked = self._asked_for(ids.shape[1], generation_config, options)
        canvas = Canvas(ids, attention_mask, asked.new, self.mask_id)
        if self.backbone.model.alignment == "next" and bool((canvas.is_masked & (canvas.place == 0)).any()):
            raise ValueError("the first position is predicted from the one before it, so it must be given")
        while bool(canvas.is_masked.any()):
            self._step(canvas, asked)
        return canvas.xt

    def _asked_for(self, given, generation_config, options):
        """Returns what `generate` was asked for, with `given` positions; warns of options that it does not know."""
        configs = (generation_config, self.generation_config)
        threshold = first_threshold([options, *(vars(each) for each in configs if each is not None)])
        options.pop("threshold", None)

        def choose(name, default=None):
            found = [options.pop(name, None), *(getattr(each, name, None) for each in configs)]
            return next((value for value in found if value is not None), default)

        length, model = self.config.tokens["length"], self.backbone.model
        asked = SimpleNamespace(
            score=ORDERS[choose("order", "prob")],
            count=choose("tokens_per_step", 1),
            threshold=threshold,
            block_size=self.backbone.block_size or choose("block_size"),
            reads_ahead=choose("reads_ahead", True),
            warpers=self._warpers(choose),
            ends=self._ends(options.pop("eos_token_id", None), stops=choose("stop_early", True)),
        )
        room = (options.pop("max_length", None) or length) - given
        asked.new = choose("max_new_tokens", max(room, 0))
        if model.learned_positions and given + asked.new > length:
            raise ValueError(f"{given} + {asked.new} tokens: the model has {length} positions")
        if ignored := sorted(name for name, value in options.items() if value is not None):
            logger.warning_once(f"generate: ignored, for nothing here needs it: {', '.join(ignored)}")
        return asked

    def _step(self, canvas, asked):
        """Fills in the positions of one step: predicts those that it may, and reveals the surest."""
        eligible, is_read, width = self._window(canvas, asked)
        hidden = self._hidden(canvas.xt[:, :width], is_read[:, :width])[eligible[:, :width]]
        logits = self._logits(hidden)
        is_new = chosen(logits.log_softmax(dim=-1), canvas.place, eligible, asked)
        canvas.fill(is_new, canvas.xt.masked_scatter(eligible, self._values(logits, asked.warpers)))
        if asked.ends is not None:
            canvas.end(asked.ends)

    def _window(self, canvas, asked):
        """Returns which positions may be revealed now and which are read, both (B, L), and how many columns are read.

        With blocks it is the first of each row that has something masked.
        """
        if asked.block_size is None:
            return canvas.is_masked, canvas.is_real, canvas.xt.shape[1]
        width, block = canvas.xt.shape[1], canvas.place // asked.block_size
        current = block.masked_fill(~canvas.is_masked, width).amin(dim=1, keepdim=True)
        eligible, is_read = canvas.is_masked & (block == current), canvas.is_real
        if self.backbone.block_size is not None:  # no later one is seen
            is_unfinished = canvas.is_masked.any(dim=1, keepdim=True)
            width = int(((block <= current) & is_unfinished).sum(dim=1).amax())
        elif not asked.reads_ahead:
            is_read = is_read & (block <= current)
        return eligible, is_read, width

    def _warpers(self, choose):
        """Returns what changes logits before values are drawn; None: the likeliest are taken."""
        do_sample, temperature = choose("do_sample", False), choose("temperature", 1.0)
        top_k, top_p = choose("top_k", 0), choose("top_p", 1.0)
        if not do_sample:
            return None
        warpers = [TemperatureLogitsWarper(float(temperature))]
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        return warpers + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])

    def _values(self, logits, warpers):
        """Returns a token for each row of logits."""
        if warpers is None:
            return logits.argmax(dim=-1)
        temper, *limits = warpers
        logits = temper(None, logits)
        # Each limit by itself: after the one, the other would be a share of what is left.
        for limited in [limit(None, logits) for limit in limits]:
            logits = logits.masked_fill(limited == -torch.inf, -torch.inf)
        return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(1)

    def _ends(self, given, stops):
        """Returns the tokens that end an answer; None if nothing does."""
        tokens = self.config.tokens
        pads = stops and (self.backbone.model.causal or tokens["pad_id"] == tokens["eos_id"])
        found = tokens["eos_id"] if given is None and pads else given
        return None if found is None else torch.as_tensor(found, device=self.device).flatten()
