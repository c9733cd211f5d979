"""The host's side of speculative decoding: how many tokens are proposed in the next run."""

from collections.abc import Mapping

import numpy as np
from keras import ops

from keras_mamba2.generation.proposers import Proposer
from keras_mamba2.host.decoding import Decoding
from keras_mamba2.host.rows import DECODE_CAPACITY
from keras_mamba2.host.rows import Rows
from keras_mamba2.models.weights_read import bytes_read

# How many tokens may be proposed, each number being a program.
CHOICES = (3, 7)
# What they cost, in steps: that there is more than one row in a product, and each further row. On a
# CPU the product of a matrix with one row is a faster one: benchmarks/README.md.
COST = {"cpu": (0.2, 0.07)}
ELSEWHERE = (0.0, 0.02)
# Rounds before the choice is thought over; of a probe, after a while without proposals, which is
# also the least, where runs are short.
ROUNDS, PROBE = 32, 6
SHORTEST_PAUSE, LONGEST_PAUSE = 32, 2048  # tokens


class SpeculativeDecoding(Decoding):
    """As `Decoding`, with tokens that the generator's `speculation` proposes.

    With a fixed number of proposals every run has it. Else the number follows how many are
    accepted, and where they do not pay, none are made for a while.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model, self._proposer = self.generator.model, self.generator.speculation
        b, known = len(self.rows.remaining), self.generator.costs_of_rounds
        if b not in known:
            rounds = {k: cost_of_a_round(k, model.backbone, b) for k in choices_of(self._proposer)}
            known[b] = rounds, self._proposer.cost(model, b)
        self._pace = Pace(*known[b])
        self._unread: list[list[np.ndarray]] = [[] for _ in self.rows.remaining]

    def advance(self, num_steps: int):
        k = self._pace.num_tokens
        if not k:
            # Without the context, whose room would be one more shape to compile for.
            context, self.rows = self.rows.context, self.rows._replace(context=())
            rows, tokens, logprobs = super().advance(min(num_steps, self._pace.pause))
            self._keep(ops.convert_to_numpy(tokens))
            self._pace.rest(num_steps)
            return Rows(*rows)._replace(context=context), tokens, logprobs
        self._read()
        rounds = min(num_steps, self._pace.rounds)
        rows, tokens, logprobs, outcome = self.generator.speculate(
            self.rows, rounds, k, self._with_logprobs
        )
        self._pace.record(rounds, int(outcome.accepted), int(outcome.rejected))
        return rows, tokens, logprobs

    def _keep(self, tokens: np.ndarray) -> None:
        """Keeps tokens that the proposer has not seen, for when it is asked next."""
        for unread, row in zip(self._unread, tokens, strict=True):
            unread.append(row[row >= 0])

    def _read(self) -> None:
        if any(self._unread):
            new = [np.concatenate([np.zeros(0, "int32"), *row]) for row in self._unread]
            context = self._proposer.read(self.rows.context, new)
            self.rows = self.rows._replace(context=context)
            self._unread = [[] for _ in new]


class Pace:
    """How many tokens to propose, from how many were accepted.

    Args:
        costs: for each number of tokens that may be proposed what the model's round costs, in
            steps. If there is one, it is always taken.
        cost: float, of proposing one token, in steps of the model.
    """

    def __init__(self, costs: Mapping[int, float], cost: float):
        self._costs = costs
        self._fixed = next(iter(costs)) if len(costs) == 1 else None
        self._cost = cost
        self._rounds = np.zeros(3, "int64")  # since the last thought: their number, and their fate
        self._acceptance: float | None = None  # of a proposal whose predecessors were accepted
        self._wait = SHORTEST_PAUSE
        self.pause = 0  # how many tokens to make without proposals

    @property
    def num_tokens(self) -> int:
        if self._fixed is not None:
            return self._fixed
        if self.pause > 0:
            return 0
        if self._acceptance is None:
            return min(self._costs)
        return max(self._costs, key=self.gain)

    @property
    def rounds(self) -> int:
        if self._fixed is not None:
            return DECODE_CAPACITY
        return PROBE if self._acceptance is None else ROUNDS

    def gain(self, k: int) -> float:
        """How many times faster than without proposals, at the present acceptance."""
        a = self._acceptance or 0.0
        tokens = sum(a**i for i in range(k + 1))
        return tokens / (self._costs[k] + self._cost * (k + 1))

    def record(self, rounds: int, accepted: int, rejected: int) -> None:
        self._rounds += rounds, accepted, rejected
        rounds, accepted, rejected = self._rounds
        if self._fixed is not None or rounds < PROBE or not accepted + rejected:
            return
        self._rounds[:] = 0
        measured = accepted / (accepted + rejected)
        old = self._acceptance
        self._acceptance = measured if old is None else (old + measured) / 2
        if max(map(self.gain, self._costs)) <= 1:
            self.pause, self._acceptance = self._wait, None
            self._wait = min(2 * self._wait, LONGEST_PAUSE)
        else:
            self._wait = SHORTEST_PAUSE

    def rest(self, num_tokens: int) -> None:
        """Takes note of tokens that were made without proposals."""
        self.pause -= num_tokens


def choices_of(proposer: Proposer) -> tuple[int, ...]:
    """How many tokens it may propose in a round, each number being a program."""
    return CHOICES if proposer.num_tokens is None else (proposer.num_tokens,)


def cost_of_a_round(k: int, backbone, batch_size: int) -> float:
    """Of the model, in steps: more tokens take more of the experts, where there are any."""
    import jax

    block, row = COST.get(jax.default_backend(), ELSEWHERE)
    step, read = (bytes_read(backbone, batch_size * tokens) for tokens in (1, k + 1))
    return read / step + block + row * k
