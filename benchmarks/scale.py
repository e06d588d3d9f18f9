"""What a step needs on many GPUs, calculated: bytes on each, bytes sent by each, and seconds. No measurement.

`python benchmarks/scale.py` prints the tables of docs/design/scale.md, and says with what it reckons.
"""

from dataclasses import dataclass

GB, MB = 1e9, 1e6
FLOPS, IN_NODE, BETWEEN_NODES, PER_NODE = 400e12, 300e9, 45e9, 8
"""An H100 as it trains (40 % of its bfloat16 peak); bytes a second of NVLink and of a 400 Gb/s card, each GPU's."""
LATENCY = 20e-6  # seconds of one collective between nodes, for each doubling of the processes
WORLDS = (1, 8, 16, 64)


@dataclass(frozen=True)
class Model:
    """`vocabulary x width` of the parameters are the embedding, and as many the head if it is not `tied`."""

    name: str
    layers: int
    width: int
    vocabulary: int
    length: int
    rows: int
    """On each GPU."""
    parameters: float
    tied: bool

    @property
    def block(self) -> float:
        """Parameters of one block."""
        return (self.parameters - self.ends) / self.layers

    @property
    def ends(self) -> float:
        """Embedding and head."""
        return (1 if self.tied else 2) * self.vocabulary * self.width

    def compute_seconds(self) -> float:
        """6 operations a parameter and token, 8 in blocks that are computed again; the head reads half the tokens."""
        per_token = 8 * self.block * self.layers + 6 * self.vocabulary * self.width / 2
        return per_token * self.rows * self.length / FLOPS

    def activations(self) -> float:
        """With `model.checkpointing`: the fp32 stream between blocks, and one block's inside (34 D of 2 bytes)."""
        tokens = self.rows * self.length
        return tokens * self.width * (4 * self.layers + 34 * 2)

    def pool_bytes(self) -> float:
        """Of PUMA, for each GPU: x0 and two masks, the next examples, and a step's temporary copies of as much."""
        return 2 * self.rows * self.length * (8 + 1 + 1) * 2


MODELS = (
    Model("125M", 14, 512, 151_667, 512, 32, 1.25e8, True),
    Model("1.5B", 28, 1536, 151_667, 1024, 16, 1.54e9, True),
    Model("7B", 28, 3584, 152_064, 2048, 4, 7.6e9, False),
)


def ddp_bytes(model: Model) -> float:
    """Weights, gradients, two moments and the average, all fp32."""
    return 20 * model.parameters + model.activations() + model.pool_bytes()


def fsdp_bytes(model: Model, world: int) -> float:
    """The same, shared out; gathered: the ends in fp32 with their gradients, two blocks in bfloat16 and a gradient."""
    gathered = 8 * model.ends + 3 * 2 * model.block
    return 20 * model.parameters / world + gathered + model.activations() + model.pool_bytes()


def ddp_sent(model: Model, world: int) -> float:
    """A ring: every GPU sends the fp32 gradients twice, but for its own part."""
    return 2 * 4 * model.parameters * (world - 1) / world


def fsdp_sent(model: Model, world: int) -> float:
    """Blocks gathered twice in bfloat16, and their gradients scattered in fp32; the ends gathered once, in fp32."""
    return (8 * model.block * model.layers + 8 * model.ends) * (world - 1) / world


def seconds(sent: float, world: int) -> float:
    """The slowest link's."""
    return 0.0 if world == 1 else sent / (IN_NODE if world <= PER_NODE else BETWEEN_NODES)


def table(model: Model) -> list[str]:
    head = f"{model.name}: {model.parameters / 1e9:.2f}e9 parameters, {model.rows} rows of {model.length} on each GPU, "
    lines = [
        head + f"{1e3 * model.compute_seconds():.0f} ms of products, pool {model.pool_bytes() / MB:.1f} MB",
        "",
        "| GPUs | DDP GB | sent GB | ms | FSDP2 GB | sent GB | ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for world in WORLDS:
        cells = [f"{world}"]
        ddp, fsdp = (ddp_bytes(model), ddp_sent(model, world)), (fsdp_bytes(model, world), fsdp_sent(model, world))
        for size, sent in (ddp, fsdp):
            cells += [f"{size / GB:.1f}", f"{sent / GB:.1f}", f"{1e3 * seconds(sent, world):.0f}"]
        cells[4:] = ["-"] * 3 if world == 1 else cells[4:]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def thousand() -> list[str]:
    """1,000 GPUs and 10^12 tokens, with the 7B model."""
    model, world = MODELS[-1], 1000
    tokens = model.rows * model.length * world
    steps = 1e12 / tokens
    step = max(model.compute_seconds(), seconds(fsdp_sent(model, world), world))
    state = 16 * model.parameters
    return [
        f"{model.name} on {world} GPUs: {tokens / 1e6:.1f}e6 tokens a step, {steps:,.0f} steps of {step:.1f} s: "
        f"{steps * step / 86400:.1f} days; checkpoint {state / GB:.0f} GB, {state / 2e9:.0f} s through one process at "
        "2 GB/s; "
        f"a collective's latency {1e3 * LATENCY * world.bit_length():.1f} ms; "
        f"one GPU in 1000 fails every {50_000 / world:.0f} h, at 50,000 h between failures of one",
    ]


if __name__ == "__main__":
    for each in MODELS:
        print("\n".join(table(each)))
    print("\n".join(thousand()))
