"""Times: `t` in (0, 1] is the masked fraction of a block's maskable positions. t = 1 is all masked.

A `Density` is a distribution that times are drawn from. A `DensityConfig` is the section of settings, `process.time`,
that describes one by name. BD3-LM (2503.09573, section 5.2) clips t, drops the weight 1/t and reports under uniform t;
2605.13026 samples t from a bell-shaped density, whose form could not be read: the bells here are ours.

Dimensions: b rows of this process, N blocks of a row (1 in plain diffusion), C cells of a table.
"""

from abc import abstractmethod
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator
from torch import Tensor

from unmask import noise
from unmask.blocks import blocks_of
from unmask.config.registry import COMPONENTS, about_owners, foreign_code, resolve
from unmask.config.settings import Section, WrongSettings, check_section
from unmask.errors import UserError
from unmask.noise import Purpose


class Density:
    """A density q on (0, 1] that is constant within each of C equal cells.

    All its functions are exact for these steps: a formula is no better than its table, but sampling, density and
    weights always agree. One cell is the uniform density, to the last bit.

    Args:
        mass: mass of each cell, up to a common factor.

    Raises:
        UserError: no mass, or negative or non-finite mass.
    """

    def __init__(self, mass: Float[Tensor, "C"]) -> None:
        mass = noise.wide(mass)
        total = mass.sum()
        if not (torch.isfinite(total) and total > 0 and (mass >= 0).all()):
            raise UserError(f"a density of times must have mass, none of it negative; its {len(mass)} cells do not")
        self.mass = mass / total
        self._cdf = torch.cat([mass.new_zeros(1), self.mass.cumsum(dim=0)])
        self._cdf[-1] = 1

    @property
    def cells(self) -> int:
        """C."""
        return len(self.mass)

    @property
    def mean(self) -> float:
        """E[t], the share that is masked on average."""
        middle = (torch.arange(self.cells, dtype=self.mass.dtype, device=self.mass.device) + 0.5) / self.cells
        return float((self.mass * middle).sum())

    def density(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Returns q(t), for t in (0, 1]."""
        cell = (t * self.cells).ceil().long().clamp(min=1, max=self.cells) - 1
        return self.mass[cell] * self.cells

    def cdf(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Returns the mass of (0, t]."""
        place = noise.wide(t) * self.cells
        cell = place.long().clamp(max=self.cells - 1)
        return self._cdf[cell] + (place - cell) * self.mass[cell]

    def icdf(self, u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Returns the time below which lies the mass u; for u in (0, 1], one that has density."""
        u = noise.wide(u)
        cell = torch.searchsorted(self._cdf[1:], u.contiguous()).clamp(max=self.cells - 1)
        within = (u - self._cdf[cell]) / self.mass[cell].clamp(min=torch.finfo(u.dtype).tiny)  # u = 0 has no mass
        return (cell + within.clamp(max=1)) / self.cells

    @property
    def mirrored(self) -> "Density":
        """Density of 1 - t, the share that is revealed."""
        return Density(self.mass.flip(0))

    def resized(self, cells: int) -> "Density":
        """Returns the density in `cells` equal cells, each with the mass that lies there now."""
        edges = torch.arange(cells + 1, dtype=self.mass.dtype, device=self.mass.device) / cells
        return Density(self.cdf(edges).diff().clamp(min=0))  # rounding

    def to(self, device: torch.device) -> "Density":
        """Returns the density with its table on `device`."""
        dtype = noise.widest(device)
        is_there = self.mass.device == device and self.mass.dtype == dtype
        return self if is_there else Density(self.mass.to(dtype).to(device))


UNIFORM = Density(torch.ones(1, dtype=torch.float64))


def stratified(
    q: Density,
    rows: Int[Tensor, "b"],
    global_batch: int,
    seed: int,
    step: int | Int[Tensor, "b 1"],
    num_blocks: int = 1,
) -> Float[Tensor, "b N"]:
    """Draws times for the global batch's rows `rows` in `step`, one in each of `global_batch x N` equal strata.

    Every block's time has density q, and the batch covers it evenly, which lowers the variance of the loss (MDLM's
    code calls this antithetic). Which block has which stratum changes with the step, so that micro-batches and
    processes all see the whole range.

    Raises:
        UserError: the density gives a time outside (0, 1].
    """
    block = blocks_of(rows, num_blocks)
    total = global_batch * num_blocks
    stratum = noise.permute(block, total, seed, Purpose.TIME, step)
    u = (stratum + 1 - noise.uniform(seed, Purpose.TIME, step, block)) / total  # in (0, 1]
    t = q.icdf(u)
    if not ((t > 0) & (t <= 1)).all():
        raise UserError(f"times lie in (0, 1], but some are in [{t.min():g}, {t.max():g}]; mend the density")
    return t


def masked_count(t: Float[Tensor, "*b"], num_maskable: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """Returns n = ceil(t L_b) of a block's L_b maskable positions; for uniform t it is uniform on {1, .., L_b}."""
    return (t * num_maskable).ceil().long().clamp(min=1).minimum(num_maskable)


CELLS = 4096
_POINTS = 16  # of a cell, at which a formula is evaluated: densities may rise steeply at the ends


class DensityConfig(Section):
    """The settings of a density: a section `process.time`. A subclass adds its own and says what they stand for."""

    name: str

    def build(self) -> Density:
        """Returns `density()`. Raises `UserError` where code of the user's own fails at it."""
        with foreign_code("time", self.name, "cannot make it"):
            return self.density()

    @abstractmethod
    def density(self) -> Density:
        """Returns the density that the settings describe."""


class Uniform(DensityConfig):
    """q(t) = 1."""

    name: str = "uniform"

    def density(self) -> Density:
        return UNIFORM


class FormulaConfig(DensityConfig):
    """A density given by the logarithm of a formula, up to a constant."""

    @abstractmethod
    def log_shape(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Returns log q(t), up to a constant."""

    def density(self) -> Density:
        points = CELLS * _POINTS
        log_shape = self.log_shape((torch.arange(points, dtype=torch.float64) + 0.5) / points)
        return Density((log_shape - log_shape.max()).exp().view(CELLS, _POINTS).sum(dim=1))


class Clipped(FormulaConfig):
    """U(low, high) (BD3-LM, 2503.09573)."""

    name: str = "clipped"
    low: float = Field(0.3, ge=0, lt=1, description="times are above it")
    high: float = Field(0.8, gt=0, le=1, description="and not above this")

    @model_validator(mode="after")
    def _check(self) -> "Clipped":
        if self.low + 1 / CELLS > self.high:
            raise ValueError(
                f"low={self.low}, high={self.high} leave no time between them; take them 1/{CELLS} apart, or more"
            )
        return self

    def log_shape(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return torch.where((t > self.low) & (t <= self.high), 0.0, -torch.inf)


class Beta(FormulaConfig):
    """t^(a - 1) (1 - t)^(b - 1), up to a constant."""

    name: str = "beta"
    a: float = Field(3.0, gt=0, description="the density goes as t^(a - 1) towards 0")
    b: float = Field(3.0, gt=0, description="and as (1 - t)^(b - 1) towards 1")

    def log_shape(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return (self.a - 1) * t.log() + (self.b - 1) * (-t).log1p()


class TruncatedNormal(FormulaConfig):
    """The normal density of this mean and deviation on (0, 1]. Its mean differs from `mean` where that is not 0.5."""

    name: str = "truncated_normal"
    mean: float = Field(0.5, ge=0, le=1, description="of the normal density, before it is cut")
    std: float = Field(0.2, ge=0.001, description="its standard deviation, before it is cut")

    def log_shape(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return -(((t - self.mean) / self.std) ** 2) / 2


class LogitNormal(FormulaConfig):
    """log(t / (1 - t)) is normal, of this mean and deviation."""

    name: str = "logit_normal"
    mean: float = Field(0.0, ge=-5, le=5, description="of log(t / (1 - t))")
    std: float = Field(1.0, ge=0.01, description="standard deviation of log(t / (1 - t))")

    def log_shape(self, t: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return -(((t.logit() - self.mean) / self.std) ** 2) / 2 - t.log() - (-t).log1p()


class Table(DensityConfig):
    """A density of one's own: its values in equal cells of (0, 1], which must integrate to one."""

    name: str = "table"
    values: list[float] = Field(
        min_length=1, max_length=CELLS, description="the density in equal parts of (0, 1]; their mean is 1"
    )

    @model_validator(mode="after")
    def _check(self) -> "Table":
        integral = sum(self.values) / len(self.values)
        if min(self.values) < 0:
            raise ValueError(f"a density is never negative, but values has {min(self.values):g}; give values >= 0")
        if abs(integral - 1) > 1e-3:
            raise ValueError(
                f"values integrate to {integral:g}, a density to 1; divide them by {integral:g}"
                if integral
                else "values are all 0: no time has mass; give some"
            )
        return self

    def density(self) -> Density:
        return Density(torch.tensor(self.values, dtype=torch.float64))


class Mixture(DensityConfig):
    """`uniform` x U(0, 1] + (1 - `uniform`) x `of`: no time is left out."""

    name: str = "mixture"
    of: SerializeAsAny[DensityConfig] = Field(description="settings of a density, with its name")
    uniform: float = Field(0.2, ge=0, le=1, description="share of the uniform density")

    @field_validator("of", mode="before")
    @classmethod
    def _check_of(cls, value: Any, info: Any) -> Any:
        return read(value, f"{info.context or 'process.time'}.{info.field_name}")

    def density(self) -> Density:
        of = self.of.build()
        if self.uniform in (0, 1):  # exactly one of them
            return UNIFORM if self.uniform else of
        both = torch.stack([of.resized(of.cells).mass, UNIFORM.resized(of.cells).mass])  # rounded alike
        return Density((1 - self.uniform) * both[0] + self.uniform * both[1])


def read(value: Any, prefix: str) -> DensityConfig:
    """Reads the settings of a density: a section, or a name for its defaults; a `Density` becomes a table.

    Raises:
        UserError: no such density, or wrong settings.
    """
    if isinstance(value, DensityConfig):
        return value
    if isinstance(value, Density):
        return Uniform() if value.cells == 1 else Table(values=(value.mass * value.cells).tolist())
    tree = {"name": value} if isinstance(value, str) else value
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        names = ", ".join(COMPONENTS["time"])
        raise UserError(f"give the name of a density ({names}), or its settings with name")
    name, key = tree["name"], prefix if isinstance(value, str) else f"{prefix}.name"
    try:
        component = resolve("time", name, key)
        with foreign_code("time", name, "cannot check its settings", key):
            about_key = partial(about_owners, "time", name, key=key)
            section: DensityConfig = check_section(component, tree, prefix, about_key)
    except UserError as error:
        raise WrongSettings(str(error)) from error  # which names the key itself
    return section


TimeConfig = Annotated[
    SerializeAsAny[DensityConfig],
    BeforeValidator(lambda value: read("uniform" if value is None else value, "process.time")),
]
"""The setting `process.time`; null = uniform."""
