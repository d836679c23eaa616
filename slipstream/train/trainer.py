"""The trainer: TRL's `SFTTrainer` with the model's own loss, and checkpoints that any number of ranks can continue."""

import dataclasses
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from slipstream import hf_trainer
from slipstream.checkpoint.resume import Checkpointer, Resumed, load
from slipstream.cuda_graphs import GraphedStep
from slipstream.loss import deferred_causal_lm_loss
from slipstream.moe.balance import check_routers
from slipstream.optim import AdamW
from slipstream.parallel.clip import divisor, total_grad_norm
from slipstream.train.batches import SharedRows
from slipstream.train.guards import BadStepError, StepGuard
from slipstream.train.late import Clock, LateLog, Later, LateVerdict, Snapshot
from slipstream.train.packing import count_tokens, make_collator
from slipstream.train.routers import ROUTER_NORM, Routers
from slipstream.train.throughput import GIB, flops_per_token, mfu, peak_memory_gib

TRAINER_STATE = "trainer_state.json"
# What TRL and Transformers set on a model's config for the time of training.
CHANGED_KEYS = ("output_router_logits", "router_aux_loss_coef", "use_cache")
_ITEMS = "num_items_in_batch"


class SlipstreamTrainer(hf_trainer.CheckpointHooks, hf_trainer.UpdateHook, hf_trainer.LogHook, SharedRows, SFTTrainer):
    """`SFTTrainer` on tokenized rows whose loss is the model's own, so that the logits are never built.

    TRL 1.16 puts a head of its own on the model (log-probabilities, entropy, accuracy), which would bypass the loss of
    an accelerated one. Held-out loss is the mean cross-entropy over all trained tokens, whatever the batch size, and
    has neither load-balancing term nor z-loss. The config that is saved is the one that was loaded.

    A callback that sets `control.should_save` has `checkpointer` save, also what was sharded at load time, for which
    Transformers has no checkpoints; `train(resume_from_checkpoint=folder)` continues from there.

    A log of training has also what `docs/training.md` lists: speed, memory, and how the experts of each layer fare.

    The host does not wait for the device: with our optimizer, clipping and a bad step are the device's business, and
    verdicts and logs are read a step later (`settle`).

    Attributes:
        run_info: JSON data that every checkpoint carries.
        routers: what is watched and changed of the model's routers.
        tokens: tokens trained on so far on all ranks, padding not counted.
        seconds: the time these took, evaluation not counted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        peft_config: LoraConfig | None = None,
        checkpointer: Checkpointer | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        z_loss: float = 0.0,
        max_length: int = 0,
        guard: StepGuard | None = None,
        freeze_router: bool = False,
        router_bias_update_rate: float = 0.0,
        row_length: float = 0.0,
        cuda_graphs: bool = False,
    ) -> None:
        """`guard` judges each step before its update. `row_length` is the mean of the documents', which MFU needs, and
        `cuda_graphs` (`GraphedStep`) for packed rows."""
        config = model.config.get_text_config()
        loaded = [(c, key, getattr(c, key)) for c in (config, model.config) for key in CHANGED_KEYS if hasattr(c, key)]
        if args.router_aux_loss_coef is None and not getattr(config, "output_router_logits", False):
            args.router_aux_loss_coef = 0.0  # TRL would turn it on wherever the config has a coefficient
        elif args.router_aux_loss_coef is not None:
            if not hasattr(model, "router_aux_loss_coef"):
                raise ValueError(
                    f"train.router_aux_loss_coef={args.router_aux_loss_coef}: {type(model).__name__} has no "
                    "load-balancing loss; leave it out, or balance by train.router_bias_update_rate"
                )
            # The config is read only when the model is built.
            model.__dict__["router_aux_loss_coef"] = args.router_aux_loss_coef
        if z_loss and model.loss_function is not deferred_causal_lm_loss:
            raise ValueError(
                f"train.z_loss={z_loss}: only the fused loss has it, and {type(model).__name__} keeps Transformers' "
                "(slipstream.describe says why); leave it out"
            )
        check_routers(model, freeze_router, router_bias_update_rate)
        own_forward = model.__dict__.get("forward")
        super().__init__(
            model=model,
            args=args,
            data_collator=make_collator(processing_class, max_length, row_length if cuda_graphs else 0.0),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.remove_callback(PrinterCallback)
        # Undo what TRL and Transformers did to the model that was passed in: its forward and its config.
        del model.forward
        if own_forward is not None:
            model.forward = own_forward
        for owner, key, value in loaded:
            setattr(owner, key, value)
        self._router_kwarg = hasattr(config, "output_router_logits")
        self.z_loss = z_loss
        self.tokens, self.seconds = 0, 0.0
        self._new_tokens = torch.zeros((), dtype=torch.long, device=args.device)
        self._clock: Clock | None = None
        self._counted_to = 0.0
        self.checkpointer = checkpointer
        self.run_info: dict[str, Any] = {}
        self._resumed: Resumed | None = None
        assert self.model is not None
        self.guard = guard
        self.routers = Routers(self.model, args.device, freeze_router, router_bias_update_rate)
        self._row_length = row_length
        self._flops: float | None = None
        self._before_step: Snapshot | None = None
        self._verdict: LateVerdict | None = None
        self._late_log: LateLog | None = None
        self._cuda_graphs = cuda_graphs
        self._graphed: GraphedStep | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE)))
            if state.global_step >= state.max_steps:
                # Trainer would make one step more.
                load(Path(resume_from_checkpoint), self.model)
                self.state = state
                return None
        self._flops = flops_per_token(self.model, self._row_length) if self._row_length else None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._graphed = None

    def save_checkpoint(self) -> None:
        assert self.checkpointer is not None
        assert self.model is not None
        self.settle()
        self.store_flos()
        guard = {} if self.guard is None else {"guard": self.guard.state()}
        self.checkpointer.save(
            self.state.global_step,
            self.model,
            self._bare_optimizer(),
            self.lr_scheduler,
            info={**self.run_info, **guard, "tokens": self.tokens, "seconds": self.seconds},
            rank_info={"new_tokens": int(self._new_tokens), **hf_trainer.unlogged_loss(self)},
            files={TRAINER_STATE: json.dumps(dataclasses.asdict(self.state), indent=2)},
        )

    def load_checkpoint(self, path: str) -> None:
        assert self.model is not None
        self._resumed = load(Path(path), self.model, self._bare_optimizer(), self.lr_scheduler)

    def continue_training(self) -> None:
        assert self._resumed is not None
        self.tokens, self.seconds = self._resumed.info["tokens"], self._resumed.info["seconds"]
        ranks = self._resumed.rank_infos
        # A log takes the mean of the ranks' losses and the sum of their tokens.
        hf_trainer.set_unlogged_loss(self, sum(rank["loss"] for rank in ranks) / len(ranks), ranks[0]["logged_step"])
        if self._resumed.same_ranks or self.args.process_index == 0:
            self._new_tokens += sum(rank["new_tokens"] for rank in ranks)
        if self.guard is not None and "guard" in self._resumed.info:  # nothing looked, where it is not
            self.guard.load_state(self._resumed.info["guard"])
        self._resumed.restore_rng()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._clock is None:
            self._clock = Clock(self.args.device)
            self._counted_to = time.perf_counter()
        if self.guard is not None:
            if self.guard.at_first_batch:
                self._before_step = Snapshot(self)
            self.guard.see(inputs)
        tokens = count_tokens(inputs)
        if self.args.process_index % self.get_tp_size() == 0:  # the ranks that share a layer have the same rows
            self._new_tokens += tokens
        with hf_trainer.staying_in_training(model):
            loss = self._forward_backward(model, inputs, *args, **kwargs)
        if self.guard is not None:
            self.guard.see_loss(loss)
        return loss

    def _forward_backward(self, model: torch.nn.Module, inputs: dict[str, Any], items: Tensor | None = None) -> Tensor:
        eagerly = super().training_step
        if not self._cuda_graphs:
            return eagerly(model, inputs, items)
        if self._graphed is None:
            self._graphed = GraphedStep(model, lambda batch: eagerly(model, batch, batch.pop(_ITEMS)))
        batch = {**self._prepare_inputs(inputs), _ITEMS: items}
        return self._graphed(batch, (self.current_gradient_accumulation_steps,))

    def total_norm(self) -> Tensor | None:
        """The norm of the gradients, which our optimizer clips as it reads them; other optimizers get them clipped."""
        optimizer = self._bare_optimizer()
        if not isinstance(optimizer, AdamW):
            return None
        norm = total_grad_norm(param for group in optimizer.param_groups for param in group["params"])
        if self.args.max_grad_norm:
            optimizer.grad_scale = divisor(norm, self.args.max_grad_norm)
        return norm

    def before_update(self, grad_norm: Tensor) -> None:
        """Between backward and the update: the guard's verdict, router gradients for the log, and balancing."""
        assert self.model is not None
        self.settle()  # the step before
        optimizer, limit, bad = self._bare_optimizer(), self.args.max_grad_norm, None
        if self.guard is not None:
            bad = self._judge(grad_norm)
            if isinstance(optimizer, AdamW):
                optimizer.found_inf = bad
            elif self.settle():
                # An optimizer leaves parameters without gradients as they are.
                self.model.zero_grad()
        clipped = limit and not isinstance(optimizer, AdamW)
        will_log = (self.state.global_step + 1) % self.args.logging_steps == 0
        self.routers.before_update(divisor(grad_norm, limit) if clipped else None, will_log, bad)

    def _judge(self, grad_norm: Tensor) -> Tensor:
        """Whether this step's update must not be applied, a bool on the device; `settle` tells the host."""
        assert self.guard is not None
        assert self._before_step is not None
        assert self.lr_scheduler is not None
        both = torch.stack([self.guard.loss().float(), torch.as_tensor(grad_norm).to(self.args.device).float()])
        both = self.accelerator.reduce(both, "mean")  # the same for all ranks, so that they decide alike
        bad = self.guard.is_bad(*both.unbind())
        # In the log a bad step counts with the loss of the last good one.
        running, usual = hf_trainer.running_loss(self), self.guard.recent[-1] if self.guard.recent else 0.0
        running.copy_(torch.where(bad, self._before_step.running_loss + usual, running))
        self.guard.close()
        rate = float(self.lr_scheduler.get_last_lr()[0])
        self._verdict = LateVerdict(self.state.global_step + 1, Later(both), rate, self._before_step)
        return bad

    def settle(self) -> bool:
        """Hear what became of the last step, and give out its log; whether it was bad.

        Raises: BadStepError where training has to end, once the state from before the step has been saved.
        """
        bad = self._hear_verdict()
        if self._late_log is not None:
            late, self._late_log = self._late_log, None
            self._log_late(late, bad)
        return bad

    def _hear_verdict(self) -> bool:
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return False
        assert self.guard is not None
        step, guard = verdict.step, self.guard
        loss, norm = verdict.numbers.read()
        reason = guard.judge(loss, norm)
        if reason is None:
            guard.accept(loss)
            return False
        if self.state.global_step >= step:  # our optimizer has counted it
            optimizer = self._bare_optimizer()
            assert isinstance(optimizer, AdamW)
            optimizer.forget_step()
        facts = {"loss": loss, "grad_norm": norm, "learning_rate": verdict.learning_rate}
        where = f"step {step} was not applied: {reason}; its rows are in {guard.bad_folder(step)}"
        if guard.reject(step, reason, self.args.process_index, facts):
            self._late_log = None
            verdict.before.restore(self)
            if self.state.global_step and self.checkpointer is not None:
                self.save_checkpoint()
                self.checkpointer.close()
            raise BadStepError(f"{where}; the same command with train.on_bad_step=skip goes on without this update")
        guard.tell(where)
        return True

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a micro-batch, without a walk over all parameters."""
        return int(self._flops * inputs["input_ids"].numel()) if self._flops else 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Transformers' training loss (scalar), with the load-balancing term a mean over ranks and micro-batches."""
        self.routers.see(inputs.get("attention_mask"))
        loss, outputs = Trainer.compute_loss(
            self, model, {**inputs, **self.model_kwargs(training=True)}, True, num_items_in_batch
        )
        if self.aux_loss_enabled and num_items_in_batch is not None:
            # The model adds the term whole to each micro-batch, and Trainer multiplies the sum by the number of ranks.
            ranks = (
                self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
            )
            share = 1 / self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * (share - ranks)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.settle()
        started = time.perf_counter()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self._clock is not None:
            self._counted_to += time.perf_counter() - started
        return metrics

    def record_log(self, steps: int, grad_norm: Tensor, learning_rate: float, start_time: float | None) -> None:
        peak = max(peak_memory_gib(self.args.device), self._graphed.peak_bytes / GIB if self._graphed else 0.0)
        memory = torch.full_like(self._new_tokens, peak, dtype=torch.float64)
        mine = torch.stack([hf_trainer.running_loss(self).double(), self._new_tokens.double(), memory])
        self._new_tokens.zero_()
        everyone = self.accelerator.gather(mine)
        measured = self.routers.measure()
        numbers = torch.cat([part.double().reshape(-1) for part in (everyone, grad_norm, *measured.values())])
        ranks = everyone.numel() // 3
        self._late_log = LateLog(
            self.state.global_step, self.state.epoch, steps, learning_rate, start_time, ranks, [*measured],
            Later(numbers),
        )  # fmt: skip

    def _log_late(self, late: LateLog, bad: bool) -> None:
        assert self._clock is not None
        numbers = late.numbers.read()
        now = self._clock.time_of(late.numbers)
        end = 3 * late.ranks
        loss, new, memory = sum(numbers[0:end:3]) / late.ranks, int(sum(numbers[1:end:3])), max(numbers[2:end:3])
        hf_trainer.add_to_whole_loss(self, loss)
        taken, self._counted_to = now - self._counted_to, now
        speed = new / taken
        self.tokens, self.seconds = self.tokens + new, self.seconds + taken
        logs: dict[str, Any] = {
            "loss": loss / late.steps,
            "grad_norm": numbers[end],
            "learning_rate": late.learning_rate,
        }
        logs |= {"tokens_per_second": round(speed, 1), "tokens": self.tokens, "memory_gib": round(memory, 2)}
        used = mfu(speed, self._flops, self.args.device, late.ranks) if self._flops else None
        if used is not None:
            logs["mfu"] = round(used, 4)
        rows = iter(numbers[end + 1 :])
        layers = (len(numbers) - end - 1) // max(len(late.measured), 1)
        measured = {name: list(islice(rows, layers)) for name in late.measured}
        if bad:
            measured.pop(ROUTER_NORM, None)
        totals, by_layer = self.routers.health(measured)
        state = self.state
        step, epoch = state.global_step, state.epoch
        state.global_step, state.epoch = late.step, late.epoch
        self.log(logs | totals | by_layer, late.start_time)
        state.global_step, state.epoch = step, epoch
        if by_layer:
            # The history goes into every checkpoint; by layer it would be long.
            state.log_history[-1] = {k: v for k, v in state.log_history[-1].items() if k not in by_layer}

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        return self.optimizer.optimizer  # type: ignore[no-any-return]

    def model_kwargs(self, training: bool) -> dict[str, Any]:
        """What the model is given beside a batch."""
        router = {"output_router_logits": training and self.aux_loss_enabled} if self._router_kwarg else {}
        z_loss = {"z_loss": self.z_loss} if training and self.z_loss else {}
        return {"use_cache": False, **router, **z_loss}
