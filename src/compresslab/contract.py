"""All that a new algorithm must know.

A *method* is one paper in one file: a frozen dataclass whose fields are its settings (they become the keys of a recipe)
and whose class constants say where it comes from and what it needs. Add the class to `methods.METHODS` and it has a
recipe key, a command-line switch, a row in docs/papers.md, and must pass the contract tests.

Of the kinds that a recipe's steps may name (stages.py has their order), most methods are *solvers*: they round the weight of one
linear layer at a time, and all they learn of the data is the
Gram matrix of the layer's input, H = X^T X. The driver in layerwise.py gathers H once and streams the layers past any solver:

    class MyRounding(frozen dataclass):
        paper = Paper(...); needs_data = True; needs_labels = False
        bits: int = 4
        def solve(self, weight, gram, *, scale_dtype, groups_along="in") -> Solution: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compresslab.numerics.fake_quantize import FakeQuantizer
from compresslab.numerics.gates import Gate
from compresslab.numerics.grid import Grid, QuantInput, QuantWeight

if TYPE_CHECKING:  # it brings numba, 118 MB, which exports and servers do without
    from compresslab.numerics.gram import Gram

Along = Literal["in", "out"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from, and the figure that the paper is known for.

    docs/papers.md is made of these: a method's own, and those in `PAPERS`, by name, of a module that is no method.
    """

    title: str
    authors: str
    year: int
    arxiv: str | None
    claim: str


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver found for one layer.

    Attributes:
        weight: the layer's weight as codes.
        note: anything out of the ordinary that the report must tell (a raised damping, a dead channel), else "".
    """

    weight: QuantWeight | FloatWeight
    note: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatWeight:
    """A weight that stays plain numbers: what a recipe that prunes leaves where it does not round.

    Attributes:
        values: [out, in], in the dtype that is stored.
    """

    values: Tensor

    def dequantize(self) -> Tensor:
        """The weight, float32 [out, in]."""
        return self.values.float()


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a pruner made of one layer.

    Attributes:
        weight: float32 [out, in]; zeros are what was pruned, and stay zeros whatever rounds the weight afterwards.
        note: as of a Solution.
    """

    weight: Tensor
    note: str = ""


@runtime_checkable
class Method(Protocol):
    """A row of METHODS: settings as fields, these three constants on the class."""

    paper: ClassVar[Paper]
    needs_data: ClassVar[bool]
    needs_labels: ClassVar[bool]


@runtime_checkable
class Rounding(Method, Protocol):
    """A method that puts weights on a grid."""

    def grid(self) -> Grid:
        """The grid of the weights that come out."""
        ...


@runtime_checkable
class Solver(Rounding, Protocol):
    """A method that works on one linear layer at a time.

    A weight that was pruned comes with zeros, which the driver puts back after the solve. A solver that has `knows_zeros = True`
    takes a keyword `kept`, bool [out, in] or None, and makes the other weights make up for what these zeros cost.
    """

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in"
    ) -> Solution:
        """Compress one weight.

        Args:
            weight: float32 [out, in]; must not be changed.
            gram: H = X^T X of the layer's input with its cached factorisations, or None for a method without data (or
                a layer that no calibration token reached; then do what H = I would give).
            scale_dtype: the dtype in which scales are stored.
            groups_along: "out" if the layer keeps its weight as [in, out] (Conv1D), so that the neighbours on disk which
                share a scale are output channels.

        Raises:
            ValueError: if the layer cannot be handled; the driver adds the layer's name.
        """
        ...


class Layers(Protocol):
    """What is known of the layers to be pruned before the first of them is.

    Attributes:
        blocks: layer -> the block that it belongs to ("" for none), in network order.
    """

    @property
    def blocks(self) -> Mapping[str, str]: ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, float32 [out, in], one at a time and in order."""
        ...

    def norms(self) -> Mapping[str, Tensor]:
        """|X_j| of the uncompressed network, float32 [groups, in], by layer: from a pass over the calibration batches."""
        ...


@runtime_checkable
class SparsityAllocation(Method, Protocol):
    """A method that says how sparse each layer shall be; a pruner beside it, or it itself, does the pruning.

    Attributes:
        allocates: False where its settings leave every layer with the same sparsity.
    """

    @property
    def allocates(self) -> bool: ...

    def sparsities(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """The sparsity of every layer, so that of all their weights together `sparsity` become zero.

        Raises:
            ValueError: if there is no such choice.
        """
        ...


@runtime_checkable
class Pruner(Method, Protocol):
    """A method that sets weights to zero, one linear layer at a time; what rounds them, if anything, comes afterwards.

    Attributes:
        sparsity: share of zeros.
        pattern: "2:4" and the like, or None where zeros may be anywhere.
    """

    sparsity: float
    pattern: str | None

    def check(self, rows: int, columns: int) -> None:
        """ValueError if a weight [out, in] of this shape cannot be pruned so."""
        ...

    def prune(self, weight: Tensor, gram: Gram | None) -> Pruned:
        """Prune one weight.

        Args:
            weight: float32 [out, in]; must not be changed.
            gram: as in Solver.solve.

        Raises:
            ValueError: if the layer cannot be handled; the driver adds the layer's name.
        """
        ...


@runtime_checkable
class TrainedPruner(Method, Protocol):
    """A method that finds its zeros while the network is trained; recovering.py does the training.

    Between each weight and its use stands a gate, which puts the zeros in. The weight behind it keeps its numbers, so that what
    was zero can come back as long as the method lets it.

    Attributes:
        settled: the share of the training from which on there are as many zeros as there shall be; only a network after it can
            be the best one.
    """

    @property
    def settled(self) -> float: ...

    def check(self, rows: int, columns: int) -> None:
        """ValueError if a weight [out, in] of this shape cannot be pruned so."""
        ...

    def gate(self, weight: Tensor) -> Gate:
        """What stands before a weight, of any shape, which must not be changed."""
        ...

    def at_(self, gates: Mapping[str, Gate], weights: Mapping[str, Tensor], progress: float) -> None:
        """Told before each step how much of the training is over, from 0 to 1. A training that goes on after a kill comes with
        the gates' buffers and parameters as they were, and must go on with the same bits.

        Args:
            gates: of all layers that this method prunes, by layer.
            weights: what stands behind them; must not be changed.
        """
        ...


Weights = Mapping[str, Tensor]
Loss = Callable[[Weights], Tensor]


class Network(Protocol):
    """A whole network in memory, as functions of the weights that may be pruned. All of these are differentiable in them.

    Attributes:
        weights: layer -> float32 [out, in] as it is now, where what earlier rounds have pruned is zero; they ask for gradients.
        seed: what everything drawn by chance depends on.
        dtype: of the forward, in which gradients are as exact as they get.
    """

    @property
    def weights(self) -> Weights: ...

    @property
    def seed(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def losses(self, size: int | None = None, *, temperature: float = 1.0) -> Iterator[tuple[float, Loss]]:
        """(share, weights -> the mean loss) of every batch of examples; the sum of share * loss is that of all of them.

        Args:
            size: examples in a batch; None for as many as are quick.
            temperature: what logits are divided by before the softmax.
        """
        ...

    def drawn_losses(self, draw: int) -> Iterator[tuple[float, Loss]]:
        """As `losses`, but towards labels drawn from the network's own distribution, and so scaled that E[g g^T] over the
        draws, g being the gradient, is the Gauss-Newton matrix of the batch's mean loss."""
        ...

    def flow(self, weights: Weights) -> Tensor:
        """The sum of all outputs for an input of ones, in float64, where every other parameter is replaced by its magnitude
        and nothing else makes a number negative."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What a network pruner thinks of every weight.

    Attributes:
        values: layer -> float32 [out, in]; the lowest are pruned.
        updated: which weights stay, bool [out, in] by layer -> these weights, changed so as to make up for the others; None
            where they stay as they are.
    """

    values: Weights
    updated: Callable[[Weights], Weights] | None = None


@runtime_checkable
class NetworkPruner(Method, Protocol):
    """A method that sets weights to zero by what they mean to the whole network: its gradients, its curvature, its flow.

    scoring.py opens the network, asks for scores round by round, and finds the masks, which then go through the same driver as
    those of a Pruner.

    Attributes:
        sparsity: share of zeros.
        scope: where one threshold holds: in each "layer", or "global" in all of them.
        rounds: in how many steps the sparsity is reached; every step scores what is left anew.
        examples: how many to score on, at most.
        shuffled: a control: each layer keeps as many weights as the scores say, but which ones is left to chance.
        second_order: whether it differentiates twice, so that the network must be in float32, with attention in plain operations.
    """

    sparsity: float
    scope: str
    rounds: int
    shuffled: bool

    @property
    def examples(self) -> int: ...

    @property
    def second_order(self) -> bool: ...

    def check(self, rows: int, columns: int) -> None:
        """ValueError if a weight [out, in] of this shape cannot be pruned so."""
        ...

    def score(self, network: Network) -> Scores:
        """What every weight of the network is worth.

        Raises:
            ValueError: if the network cannot be scored so.
        """
        ...

    def passes(self, examples: int) -> float:
        """Forwards of all examples that a round takes, a backward counted as two."""
        ...

    def numbers_per_weight(self, examples: int) -> int:
        """How many numbers it holds at a time for every weight, beside the weight."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Removal:
    """What is left of the units that one layer reads.

    Attributes:
        kept: int64, the units that stay, ascending.
        weight: float32 [out, kept * width], what reads them.
        bias_change: float32 [out], to be added to the bias; None for nothing.
        note: as of a Solution.
    """

    kept: Tensor
    weight: Tensor
    bias_change: Tensor | None = None
    note: str = ""


@runtime_checkable
class UnitRemover(Method, Protocol):
    """A method that takes whole neurons and heads out of a network, together with all that makes and reads them.

    removing.py finds the units (groups.py) and cuts them out of the weights and the config.

    Attributes:
        neuron_frac, head_frac: shares of what every block shall lose.
    """

    neuron_frac: float
    head_frac: float

    def kept_of(self, kind: str, count: int) -> int:
        """How many of `count` "neurons" or "heads" stay. ValueError if none would."""
        ...

    def remove(
        self, reader: Tensor, producers: Sequence[Tensor], gram: Gram | None, *, keep: int, has_bias: bool
    ) -> Removal:
        """Choose the units of one group.

        Args:
            reader: float32 [out, units * width], the weight that reads them; each unit is `width` neighbouring columns.
            producers: float32 [units, rows, in], the weights that make them, one for each layer that does.
            gram: of the reader's input, from the uncompressed network; None for a method without data.
            keep: how many units stay.
            has_bias: whether the reader has a bias, which may take over what is lost on average.

        Raises:
            ValueError: if the group cannot be handled; the driver adds the reader's name.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """What the units of a coupled group (coupling.py) own of one parameter, and what was seen of it.

    Attributes:
        role: whether these weights make a unit, read it, or scale it (a norm, a bias).
        weight: float32 [units, n].
        work: multiply-accumulates of one unit in this parameter.
        products: float32 [samples, units], the sum of weight times gradient of the loss over what a unit owns, for every sample;
            None for a method that asks for none.
        inputs: float32 [samples, units], of a layer that reads: the mean over positions of |x|, summed over what it reads of a
            unit, for every sample; None elsewhere, and for a method that asks for none.
    """

    role: Literal["makes", "reads", "scales"]
    weight: Tensor
    work: int = 0
    products: Tensor | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A coupled group with the importance of its units.

    Attributes:
        kind: "channels", "heads" or "width".
        shape: the same for groups that are isomorphic.
        scores: float32 [units].
    """

    name: str
    kind: str
    shape: tuple[Any, ...]
    scores: Tensor


@runtime_checkable
class ChannelRemover(Method, Protocol):
    """A method that takes coupled channels, heads or the embedding's width out of any network.

    coupling.py finds the groups, channels.py gathers what the method asks for, cutting.py takes out.

    Attributes:
        sees: "weights" alone, or besides "gradients" or "inputs", which need data.
        macs_frac: share of the multiply-accumulates that shall be left; None where the shares of units are the target.
    """

    sees: ClassVar[Literal["weights", "gradients", "inputs"]]
    macs_frac: float | None

    def score(self, members: Sequence[Member]) -> Tensor:
        """The importance of the units of one group, float32 [units]."""
        ...

    def choose(self, groups: Sequence[Ranked], scale: float = 1.0) -> dict[str, Tensor]:
        """The units that stay, int64 and ascending, of every group that loses some.

        Args:
            scale: what all shares are multiplied with.

        Raises:
            ValueError: naming a group that would lose all its units.
        """
        ...


@runtime_checkable
class BlockRemover(Method, Protocol):
    """A method that takes whole blocks out of a network."""

    def keep_blocks(self, influence: Sequence[float]) -> list[int]:
        """The blocks that stay, ascending, by 1 - mean cosine of what goes into each block and what comes out of it.

        Raises:
            ValueError: if none would go, or none would stay.
        """
        ...


@runtime_checkable
class AwareTraining(Rounding, Protocol):
    """A method that trains a network while its weights and inputs are rounded, and says how they are."""

    def activation_grid(self) -> Grid | None:
        """The grid on which inputs are rounded, or None if they stay in float."""
        ...

    def weight_quantizer(self, rows: int, scale_dtype: torch.dtype) -> FakeQuantizer:
        """What rounds a weight [rows, in] during the training."""
        ...

    def input_quantizer(self, scale_dtype: torch.dtype) -> FakeQuantizer | None:
        """What rounds a layer's input during the training; None leaves it in float."""
        ...


@runtime_checkable
class Smoother(Method, Protocol):
    """A method that moves difficulty from activations into weights, or back, without changing what the network computes.

    Layers that read one normalised input x get W diag(s), and the norm that makes x is divided by s: (x / s)(W diag(s))^T
    is what x W^T was. smoothing.py finds such places and folds s in.

    A smoother that has `through_layers = True` is also asked about inputs that another linear layer makes (o_proj's by v_proj,
    down_proj's by up_proj), whose rows are divided by s; its `smooth` takes a keyword `same_as`, int64 [in], where input
    channels come from one channel of that layer: the first channel that must have the same scale, to the last bit. One that has
    `replays = True` takes a keyword `output_error` where several layers read the input: a function from weights [out, in]
    of these layers to the squared error of the output of the module around them, summed over the calibration tokens.
    """

    def smooth(self, weights: Sequence[Tensor], gram: Gram, *, grid: Grid, activation_grid: Grid | None) -> Tensor:
        """The scale of every channel of one input.

        Args:
            weights: float32 [out, in] of every layer that reads this input; must not be changed.
            gram: H = X^T X of the input, with the largest magnitude of every channel.
            grid: the grid on which these weights will be rounded.
            activation_grid: the grid on which the runtime will round the input, or None.

        Returns:
            s, float32 [in], positive and finite.
        """
        ...


@runtime_checkable
class Rotation(Method, Protocol):
    """A method that turns the axes of the network's hidden spaces without changing what the network computes.

    rotating.py finds the spaces and folds the rotations into the weights that write them and read them.
    """

    def residual(self, size: int, *, keeps_mean: bool) -> Tensor:
        """Q of the residual stream x, which becomes x Q: float64 [size, size], Q Q^T = I.

        Args:
            keeps_mean: the network's norms subtract the mean over the channels, so 1 Q must be 1.
        """
        ...

    def head(self, size: int) -> Tensor | None:
        """Q of every attention head's values, float64 [size, size]; None to leave them as they are."""
        ...


@runtime_checkable
class CacheRounding(Method, Protocol):
    """A method that says how the runtime stores the keys and values of past tokens. deploy/kv_cache.py does the storing."""

    @property
    def is_static(self) -> bool:
        """Whether there are scales to be learned from calibration text: two for every attention layer."""
        ...

    def scale_of(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """The scale under which magnitudes up to `largest` can be stored; of its shape, positive."""
        ...

    def store(self, states: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Codes of vectors [..., d], and the scales [..., 1] that were made for them; none if a static one is given."""
        ...

    def load(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        """The vectors [..., d] that codes stand for, float32."""
        ...


class Observer(Protocol):
    """What an activation quantizer wants to know of one input, gathered batch by batch as the calibration text passes.

    Its size must not depend on how many tokens it has seen.
    """

    def add_(self, x: Tensor) -> None:
        """Take in the tokens x [..., in], of any float dtype."""
        ...


@dataclass(frozen=True, kw_only=True)
class InputSolution:
    """How the runtime shall round one layer's input.

    Attributes:
        input: None where the input must stay in float, which the note then gives the reason for.
        note: anything out of the ordinary that the report must tell, else "".
    """

    input: QuantInput | None
    note: str = ""


@runtime_checkable
class ActivationQuantizer(Method, Protocol):
    """A method that says how the runtime rounds the inputs of layers. Any solver may round the weights beside it."""

    def activation_grid(self) -> Grid:
        """The grid on which the runtime rounds the input."""
        ...

    def observer(self, features: int) -> Observer | None:
        """What shall watch an input of this width during calibration; None if the runtime fits its own scales."""
        ...

    def fit(self, observer: Observer | None, *, scale_dtype: torch.dtype) -> InputSolution:
        """What to round with, from what was seen.

        Args:
            observer: None for a method without data, and for a layer that no calibration token reached.
            scale_dtype: the dtype in which scales are stored.

        Raises:
            ValueError: if the input cannot be handled; the driver adds the layer's name.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """A batch norm in use: y = (x - mean) / sqrt(var + eps) * weight + bias, every tensor float32 [channels]."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float


@runtime_checkable
class Folder(Method, Protocol):
    """A method that takes a batch norm away by changing the layer whose output it normalises; see rewriting.py."""

    def fold(self, weight: Tensor, bias: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
        """The weight, float32 [out, in], and bias [out] that give after no norm what these two gave before `norm`."""
        ...


@runtime_checkable
class Equalizer(Method, Protocol):
    """A method that shares out scales between two layers with nothing but elementwise functions between them.

    Where the functions satisfy f(s x) = s f(x), channel i may leave the first layer divided by s_i if the second one
    multiplies it by s_i. rewriting.py finds such pairs, folds s in, and goes on until no s differs from 1.

    Attributes:
        sweeps: over all pairs, at most.
        relu6: what becomes of a ReLU6 between the two, which does not satisfy it: "rescale", "replace" or "keep".
    """

    sweeps: int
    relu6: str

    def scales(self, first: Tensor, second: Tensor) -> Tensor:
        """s, float32 [channels], positive.

        Args:
            first: float32 [channels, m], the weights that make each channel.
            second: float32 [channels, n], the weights that read each channel.
        """
        ...


class BlockForward(Protocol):
    """A block on its own, whose layers' weights are the caller's choice."""

    def __call__(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
        """What the block returns for a batch with these weights [out, in] by layer, differentiable in them.

        The batch's input comes from the compressed blocks before.
        """
        ...

    def backward(self, indices: Sequence[int], loss: Callable[[int], Tensor], parameters: Sequence[Tensor]) -> None:
        """Add the gradient of the losses of these batches to the `grad` of the parameters.

        Each rank computes those whose batches it walks; all have the sum, added in the order of `indices`.
        """
        ...


@runtime_checkable
class Refiner(Method, Protocol):
    """A method that improves the solved layers of one block together, against what the whole block should return."""

    def refine(
        self, weights: Mapping[str, Tensor], solved: Mapping[str, QuantWeight], forward: BlockForward,
        targets: Sequence[Tensor],
    ) -> dict[str, QuantWeight]:  # fmt: skip
        """Better codes, scales or zero points for the layers of a block.

        Args:
            weights: float32 [out, in], the block's weights as they were, by layer.
            solved: what the solver made of them; grids must stay the same.
            forward: the block; called outside its `backward` only in one process.
            targets: what the uncompressed network's block returns for every batch; nothing in it for those of other ranks.

        Raises:
            ValueError: if the block cannot be handled; the driver adds its name.
        """
        ...


@runtime_checkable
class Rerunning(Protocol):
    """A method that runs parts of the network again, beyond the passes that gather its inputs."""

    def reruns(self, batches: int) -> float:
        """How many forwards of all calibration batches that comes to; a backward counts as two. The preflight adds them."""
        ...


@runtime_checkable
class Tuner(Method, Protocol):
    """A method that trains what is no code in a solved network, towards what the uncompressed one says at its end.

    Attributes:
        norms: whether the weights of norms are trained beside the scales.
    """

    norms: bool

    def distance(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """How far the network's [tokens, vocabulary] are from the uncompressed one's, summed over tokens; differentiable."""
        ...

    def scale(self, solved: QuantWeight, change: Tensor) -> Tensor:
        """The scale with the relative change p [R, G], float32, as its dtype will hold it; differentiable in p."""
        ...

    def after(self, solved: QuantWeight, change: Tensor) -> QuantWeight:
        """The solved weight with the scale so changed."""
        ...


@runtime_checkable
class Corrector(Method, Protocol):
    """A method that changes a layer's bias after its weight was rounded."""

    def correct(self, weight: Tensor, rounded: Tensor, gram: Gram) -> Tensor:
        """What to add to the bias, float32 [out].

        Args:
            weight: float32 [out, in], before rounding.
            rounded: float32 [out, in], after it.
            gram: of the layer's input, with the mean of every channel.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TopK:
    """What a cache keeps of a teacher's distributions: the k most likely classes of every row. The others share the rest.

    Attributes:
        ids: int64 [rows, k], no class twice in a row.
        log_probs: float32 [rows, k], natural logarithms at `temperature`; they may add up to less than 1.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float


@runtime_checkable
class Distilling(Method, Protocol):
    """A term of the loss that a student is taught by. Those of a recipe's steps are added up, each times its weight."""

    @property
    def weight(self) -> float: ...


@runtime_checkable
class LogitLoss(Distilling, Protocol):
    """A loss on logits, with its gradient in closed form, so that a language model's logits need never be whole in memory.

    Attributes:
        in_rows: whether each row is judged alone; if not, all rows of a batch must come in one call.
        needs_teacher: False for one that looks at labels only.
    """

    in_rows: ClassVar[bool]
    needs_teacher: ClassVar[bool]

    def rows(self, logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of every row, float [rows], and the gradient of their sum in the logits, [rows, classes].

        Args:
            logits: the student's, float32 or float64 [rows, classes]; must not be changed.
            teacher: its logits [rows, classes], of the same dtype, at minus infinity for classes that it does not know.
            labels: int64 [rows]; None where there are none, for methods that need none.

        Raises:
            ValueError: if it cannot be had from such a teacher.
        """
        ...


@runtime_checkable
class CohortLoss(Distilling, Protocol):
    """A loss of networks that learn together, without a teacher that was there before."""

    def together(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The sum over the networks, each a mean over rows; no gradient goes into one network by what another learns from it.

        Args:
            logits: of each network, [rows, classes].
            labels: int64 [rows].
        """
        ...


@runtime_checkable
class PictureMaking(Method, Protocol):
    """A method that makes the pictures which a student is taught on, from its teacher alone."""

    @property
    def batches(self) -> int:
        """How many batches `made` yields."""
        ...

    def made(
        self, teacher: nn.Module, shape: tuple[int, int, int], classes: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures [n, *shape] and their classes int64 [n], batch by batch; the same for the same seed.

        Raises:
            ValueError: if none can be made from such a teacher.
        """
        ...


@runtime_checkable
class TextWriting(Method, Protocol):
    """A method that has the student write some of the texts that it is then taught on."""

    def drawn(self) -> bool:
        """Whether this step is one on such texts, by torch's own generator."""
        ...

    def written(self, network: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the network's own continuations, and labels that count them. ValueError if it cannot be continued."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Feature:
    """What one place of a network made of a batch.

    Attributes:
        values: [examples, positions, channels]; a position is a token, or a pixel, row by row.
        counted: bool [examples, positions], False where a token is padding.
        pixels: rows and columns, where positions are pixels.
    """

    values: Tensor
    counted: Tensor
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """What the attention of one block read: with rotary positions, after the rotation.

    Attributes:
        queries, keys, values: [examples, heads, positions, width]; keys that several heads share are repeated.
        counted: as of a Feature.
        is_causal: whether a position sees itself and those before it alone.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    counted: Tensor
    is_causal: bool


@runtime_checkable
class FeatureLoss(Distilling, Protocol):
    """A loss on what happens inside student and teacher. features.py watches the places and adds the terms up.

    A place is a module's path, for what it hands on (a Feature); with "@input" behind it, for what it is given; with
    "@attention", for the Heads of the attention in it; "@logits" alone is what the whole network says. The judge of a loss that
    has `needs_labels` gets the batch's labels as a third argument.
    """

    def places(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[list[str], list[str]]:
        """The places to watch in the student and in the teacher, in the order in which the judge gets them.

        Args:
            student, teacher: paths of their blocks, in order.

        Raises:
            ValueError: if the settings name what there is not.
        """
        ...

    def judge(self, student: Sequence[Any], teacher: Sequence[Any], examples: int) -> nn.Module:
        """A module whose forward(student, teacher) is the loss, a number, of what was seen at these places: without `weight`,
        a mean over the examples, and blind to what is not counted. Its parameters are trained along with the student; its
        buffers are part of a checkpoint.

        Args:
            student, teacher: what was seen at the places on a first batch, for the shapes.
            examples: how many the training has.

        Raises:
            ValueError: if these shapes cannot be compared so.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What happened to one layer. Lengths in bytes are those of the tensors on disk.

    Attributes:
        sqnr_db: signal to quantisation-noise ratio in dB, 10 log10(|W X|^2 / |(W - Q) X|^2) over the calibration
            tokens when there were any (`sqnr_of` = "output"), of the weight itself otherwise (`sqnr_of` = "weight").
        nonzero_frac: share of weights that are not exactly zero.
        seconds: time of the solve, without the forward and the Gram matrix.
        activation_bits: width of the codes that the runtime rounds the layer's input to; None if that stays in float.
        sparsity: share of weights that a pruner set to zero; None where none was at work.
        pattern: of these zeros, such as "2:4"; None where they may be anywhere.
    """

    name: str
    method: str
    shape: tuple[int, ...]
    bits_per_weight: float
    nonzero_frac: float
    bytes_before: int
    bytes_after: int
    sqnr_db: float
    sqnr_of: str
    seconds: float
    note: str = ""
    activation_bits: int | None = None
    sparsity: float | None = None
    pattern: str | None = None


Batches = Sequence[dict[str, Tensor]]
