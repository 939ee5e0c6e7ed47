"""Part (b): the step that OpenUnlearning's trainers make, on Hugging Face's `Trainer`, against ours.

What makes theirs: a forward of the forget rows and another of the retain rows, each padded to its longest, logits and loss over the
whole vocabulary at every position; for NPO a deep copy of the model in memory, run on the forget rows in every step. Both sides see the
same rows in the same micro-batches, AdamW with the same settings, the same precision, no dropout and the same learning rate, so their
losses must agree, which is checked on the first steps. Theirs is timed a second time on rows drawn whatever their length, as its own
sampler would (ours keeps rows of similar length together; that changes which rows share a step, not the epoch).
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from perf._measure import Comparison, Moment, compare, interleaved, peak_bytes
from perf._steps import WARM_UP, Run, run_steps
from perf._workload import SPLITS, Workload
from soul.batch import IGNORE_INDEX, TokenRow
from soul.data.feed import LocalFeed
from soul.objectives.methods import NPO, GradDiff, Method
from soul.optim.configs import AdamWConfig
from soul.train.divisors import Divisors

AIMS = {"grad_diff": 2.0, "npo": 3.0}
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}  # relative, of the first steps' losses
CHECKED_STEPS = 3
Pair = dict[str, TokenRow]
Inputs = dict[str, dict[str, Tensor]]


class Pairs(Dataset[Pair]):
    """Forget row i with retain row i, in the order of our own steps."""

    def __init__(self, feed: LocalFeed, *, steps: int) -> None:
        self.items: list[Pair] = []
        self.divisors = Divisors.of(feed.plan, feed.stores)
        for step in range(steps):
            for share in feed.plan.share(step, rank=0, world=1, micro_batch_size=feed.micro_batch_size):
                rows = {split: [feed.stores[split].row(index) for name, index in share if name == split] for split in SPLITS}
                self.items += [dict(zip(SPLITS, pair, strict=True)) for pair in zip(*rows.values(), strict=True)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pair:
        return self.items[index]


def padded(rows: Sequence[TokenRow], *, pad_id: int) -> dict[str, Tensor]:
    """One split of a micro-batch, padded to its longest row."""
    ids = [torch.tensor(row.ids) for row in rows]
    labels = [
        torch.cat([torch.full((row.num_prompt,), IGNORE_INDEX), tokens[row.num_prompt :]]) for row, tokens in zip(rows, ids, strict=True)
    ]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True),
        "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


def sequence_nlls(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Per row, the loss summed over its answer, from the logits of every position."""
    logits_BTV = model(**inputs).logits
    shifted_BT = inputs["labels"][:, 1:].contiguous()
    return F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), shifted_BT, ignore_index=IGNORE_INDEX, reduction="none").sum(1)


class UnlearnTrainer(Trainer):
    """GradDiff, or NPO if it is given a reference model, by `compute_loss` as OpenUnlearning overrides it.

    What is differentiated is scaled to the divisors that we have for the whole run; `losses` are the means of each step.
    """

    def __init__(
        self, *args: Any, method: Method, reference: PreTrainedModel | None, losses: list[float], divisors: Divisors, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.reference, self.losses, self.divisors = method, reference, losses, divisors

    def share(self, inputs: Inputs, split: str) -> Tensor:
        """The tokens of a split in this step over those that a step has on average."""
        return (inputs[split]["labels"][:, 1:] != IGNORE_INDEX).sum() / self.divisors.counts[split, "tokens"]

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        assert isinstance(self.train_dataset, Pairs)
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, **_: Any) -> Any:  # type: ignore[override]
        if self.reference is None:
            forget_loss = -model(**inputs["forget"]).loss
            weight = self.share(inputs, "forget")
        else:
            assert isinstance(self.method, NPO)
            with torch.no_grad():
                reference_B = sequence_nlls(self.reference, inputs["forget"])
            ratio_B = reference_B - sequence_nlls(model, inputs["forget"])
            forget_loss = -2 / self.method.beta * F.logsigmoid(-self.method.beta * ratio_B).mean()
            weight = torch.tensor(len(ratio_B) / self.divisors.counts["forget", "sequences"])
        outputs = model(**inputs["retain"])
        if len(self.losses) < CHECKED_STEPS:
            self.losses.append(float((forget_loss + outputs.loss).detach()))
        loss = weight * forget_loss + self.share(inputs, "retain") * outputs.loss
        return (loss, outputs) if return_outputs else loss


class Clock(TrainerCallback):
    def __init__(self, run: Run, device: torch.device) -> None:
        self.run, self.device = run, device

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.run.moments.append(Moment.now(self.device))


def run_trainer(workload: Workload, pairs: Pairs, method: Method, *, steps: int) -> Run:
    """`steps` steps of a fresh model under `Trainer`."""
    run, optimizer = Run(), AdamWConfig()
    model = workload.build_model()
    reference = copy.deepcopy(model).eval() if method.name == "npo" else None
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=workload.micro_batch_size,
            gradient_accumulation_steps=workload.batch_size // workload.micro_batch_size,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_epsilon=optimizer.eps,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            bf16=workload.precision == "bf16",
            use_cpu=workload.device.type == "cpu",
            dataloader_pin_memory=workload.device.type == "cuda",
            remove_unused_columns=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = UnlearnTrainer(
            model,
            settings,
            method=method,
            reference=reference,
            losses=run.losses,
            divisors=pairs.divisors,
            train_dataset=pairs,
            data_collator=lambda items: {split: padded([item[split] for item in items], pad_id=workload.pad_id) for split in SPLITS},
            callbacks=[Clock(run, workload.device)],
        )
        trainer.remove_callback(next(type(known) for known in trainer.callback_handler.callbacks if "Printer" in type(known).__name__))
        trainer.train()
    return run


def compare_with_trainer(workload: Workload, *, rounds: int, steps: int) -> list[Comparison]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = []
    for method in (GradDiff(), NPO()):
        feed = workload.feed(reference=method.name == "npo")
        total = WARM_UP + steps
        pairs, shuffled = Pairs(feed, steps=total), Pairs(workload.feed(reference=False, window=1), steps=total)
        notes = {"largest relative difference of the first losses": check_losses(workload, feed, pairs, method)}

        def ours(feed: LocalFeed = feed, method: Method = method) -> Moment:
            return run_steps(workload, feed, method, AdamWConfig(), steps=WARM_UP + steps).per_step(steps)

        def theirs(pairs: Pairs = pairs, method: Method = method) -> Moment:
            return run_trainer(workload, pairs, method, steps=WARM_UP + steps).per_step(steps)

        moments = interleaved({"ours": ours, "Trainer": theirs, "Trainer, any length": lambda: theirs(shuffled)}, rounds=rounds)  # noqa: B023
        found += _ratios(method.name, moments, notes)
        found.append(_memory(workload, feed, pairs, method))
    return found


def check_losses(workload: Workload, feed: LocalFeed, pairs: Pairs, method: Method) -> float:
    """The largest relative difference of the first losses. Accumulation differs by design: `Trainer` averages micro-batches' means."""
    ours = run_steps(workload, feed, method, AdamWConfig(), steps=CHECKED_STEPS).losses
    theirs = run_trainer(workload, pairs, method, steps=CHECKED_STEPS).losses
    difference = max(abs(one - other) / max(abs(one), 1.0) for one, other in zip(ours, theirs, strict=True))
    if workload.batch_size == workload.micro_batch_size and difference > TOLERANCES[workload.precision]:
        raise AssertionError(f"{method.name}: our losses {ours}, Trainer's {theirs}: not the same work, so not a comparison")
    return difference


def _ratios(method: str, moments: dict[str, list[Moment]], notes: dict[str, Any]) -> list[Comparison]:
    found = []
    for name in moments.keys() - {"ours"}:
        for clock in ("wall", "cpu"):
            above, below = ([getattr(moment, clock) for moment in moments[side]] for side in (name, "ours"))
            aim = AIMS[method] if (name, clock) == ("Trainer", "wall") else None
            label = f"{method} step, {clock} time"
            found.append(
                compare("b", label, (name, above), ("ours", below), unit="s", aim=aim, at_least=True, notes=notes if aim else None)
            )
    return sorted(found, key=lambda item: (item.above, item.name != f"{method} step, wall time"))


def _memory(workload: Workload, feed: LocalFeed, pairs: Pairs, method: Method) -> Comparison:
    theirs = peak_bytes(lambda: run_trainer(workload, pairs, method, steps=CHECKED_STEPS), workload.device)
    ours = peak_bytes(lambda: run_steps(workload, feed, method, AdamWConfig(), steps=CHECKED_STEPS), workload.device)
    return compare("b", f"{method.name} peak memory", ("Trainer", [theirs]), ("ours", [ours]), unit="bytes")
