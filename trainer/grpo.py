"""Learning from marks: GRPO (Shao et al., DeepSeekMath, arXiv 2402.03300), without a text to imitate.

Of each question G answers are sampled and marked. What a mark is worth, the others of its group tell; answers above their
group's mean become likelier, those below it less likely:

    advantage A = mark - mean of the group's marks
    loss        = -1/n sum of A * log p(token | question, tokens before), over all n tokens of all answers of an update

A group of equal marks has A = 0: nobody can tell from it what to do better. --normalize 1 divides A by the group's standard
deviation, as the paper does. The default does not: it would make the questions count most that are nearly always or nearly
never answered right (Liu et al., arXiv 2503.20783). With --updates_per_batch K, the answers serve for K steps; p then is a
ratio to what it was before the first, clipped as in PPO (arXiv 1707.06347). --kl adds that much of the distance to the weights
at the start.

What is drawn depends on (seed, update, sample) beside the weights, not on processes or batches, so a run can be resumed.

Legend: G answers of a question, S tokens of the answers in a batch. What the rows of a batch are: groups.py.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dataset.answers import last_answer
from dataset.jsonl import Sample
from dataset.vlm_dataset import BadSample, Batch, ImageInput, collate
from model.conversation import IMAGE_PLACEHOLDER
from model.errors import SampleError, UsageError, first_line
from model.inference.generation import Sampling, generate_batch, text_of
from model.inference.packed import PackedDecoder
from model.model_vlm import MiniMindVLM

from .build import Run
from .checkpoint import copy_to_cpu
from .config import TrainConfig, setting
from .groups import Group, Packed, QuestionRenderer, TokenSampler, pack, read_questions
from .guards import BadData, StopRequest, TrainingFailed
from .loop import Trainer, encode
from .rewards import find_rewarder, mark
from .validation import ASKED, Validation


@dataclass(frozen=True)
class GRPOConfig(TrainConfig):
    """The settings of a training run, and those of sampling and marking."""

    reward: str = setting("exact", "what marks an answer: exact, vqa, choice, format:PATTERN, or my_module:function of one's own, which"
                          " is given (answer, sample) and returns a number from 0 to 1")  # fmt: skip
    group_size: int = setting(8, "answers sampled of each question")
    temperature: float = setting(1.0, "of sampling: above 1, answers differ more")
    max_new_tokens: int = setting(64, "longest answer in tokens; it is cut there")
    normalize: int = setting(0, "1: divide a group's advantages by the standard deviation of its marks", (0, 1))
    kl: float = setting(0.0, "weight of the distance to the weights at the start; 0: none")
    updates_per_batch: int = setting(1, "steps of the optimizer that a batch of answers serves for")
    clip: float = setting(0.2, "with several such steps: how far a token's probability may move by them, as a fraction")

    def __post_init__(self):
        super().__post_init__()
        if self.group_size < 2:
            raise UsageError(f"--group_size {self.group_size}: at least 2, for an answer is compared with the others of its group")
        if not 0 <= self.kl < float("inf"):
            raise UsageError(f"--kl {self.kl}: a number from 0 on")
        if self.eval_blind:
            raise UsageError("--eval_blind 1 measures losses; here answers are validated by their marks")
        find_rewarder(self.reward)


class BadMarks(BadData):
    """The rewarder failed."""

    remedy = "Mend it, and continue with --from_resume 1"


class GRPOTrainer(Trainer):
    """The loop of the other trainings, with another update: sample, mark, step."""

    def __init__(self, run: Run):
        saved, self.settings, self.sums = run.saved and run.saved[0], run.config, Counter()
        if self.settings.kl and saved and "reference" not in saved:
            raise UsageError(f"--kl {self.settings.kl}: {run.config.resume_file} was saved without --kl, and so without the weights at the"
                             " start: no resume is possible. Leave the flag out")  # fmt: skip
        self.renderer = run.dataset.renderer = QuestionRenderer(run.dataset.renderer, self.settings.max_new_tokens)
        self.rewarder = find_rewarder(self.settings.reward)
        self.policy = self.twin(run, run.dtype)  # what answers are sampled from: the model in the format in which it computes
        self.reference = None  # the weights at the start
        super().__init__(run)
        if self.settings.kl:
            self.reference = self.twin(run, torch.float32)
            self.reference.load_state_dict(saved["reference"] if saved else run.model.state_dict())
        self.asked = np.linspace(0, len(run.dataset) - 1, min(ASKED, len(run.dataset))).astype(int).tolist()

    @staticmethod
    def twin(run: Run, dtype: torch.dtype) -> MiniMindVLM:
        """A model of the run's kind without vision encoder, for inference."""
        return MiniMindVLM(run.model.config).to(run.ranks.device, dtype).eval().requires_grad_(False)

    def make_validation(self, workers: int) -> "MarkValidation":
        """Validation by marks."""
        return MarkValidation(self, workers)

    def snapshot(self) -> dict:
        """As of other trainings, and with --kl the weights at the start."""
        return super().snapshot() | ({"reference": copy_to_cpu(self.reference.state_dict())} if self.reference else {})

    # --- sampling and marking -----------------------------------------------------------------------------------------

    def decoder(self) -> PackedDecoder:
        """The model as it is now, laid out for sampling."""
        self.policy.load_state_dict(self.run.model.state_dict())
        return PackedDecoder(self.policy)

    def sample(self, decoder: PackedDecoder, batch: Batch) -> list[Group]:
        """Marked answers to the questions of a batch from which something can be learned."""
        settings, G = self.settings, self.settings.group_size
        if not batch.indices:
            return []
        prompts, features = read_questions(self.run, batch)
        images = {number: ImageInput(features=vectors) for number, vectors in features.items()}
        keys = [(settings.seed, self.state.update, index) for index in batch.indices]
        uniforms = np.concatenate([np.random.default_rng(key).random((G, settings.max_new_tokens), np.float32) for key in keys])
        sampler = TokenSampler(torch.from_numpy(uniforms).to(self.ranks.device), settings.temperature)
        limit = Sampling(max_new_tokens=settings.max_new_tokens)
        texts = generate_batch(decoder, [prompt for prompt in prompts for _ in range(G)], features, limit, self.renderer.im_end, sampler)
        found = []
        for number, (prompt, index) in enumerate(zip(prompts, batch.indices, strict=True)):
            rows = range(number * G, (number + 1) * G)
            answers = [tuple(texts[row]) + (self.renderer.im_end,) * (len(texts[row]) < settings.max_new_tokens) for row in rows]
            counts, sample = Counter(answers), self.run.dataset.samples[index]
            marks = {answer: self.mark(answer, sample) for answer in counts}
            mean = sum(marks[answer] * count for answer, count in counts.items()) / G
            deviation = (sum((marks[answer] - mean) ** 2 * count for answer, count in counts.items()) / G) ** 0.5
            same = len(set(marks.values())) == 1
            for row, answer in zip(rows, answers, strict=True):
                self.sums["entropy"] += sum(entropy for _, entropy in sampler.chosen[row][: len(answer)])
            self.sums.update(groups=1, same=same, answers=G, reward=mean * G, tokens=sum(map(len, answers)))
            if same and not self.reference:
                continue
            shown, different = tuple(images[number] for number in prompt.images), list(counts)
            share = max(1, 2 * len(prompt.ids) // max(map(len, different)))  # answers of a row: attention costs its square
            for own in (different[at : at + share] for at in range(0, len(different), share)):
                advantages = [0.0 if same else (marks[answer] - mean) / (deviation if settings.normalize else 1.0) for answer in own]
                sampled = [chance for answer in own for chance, _ in sampler.chosen[rows[answers.index(answer)]][: len(answer)]]
                found.append(Group(prompt, shown, own, sampled, advantages, [counts[answer] for answer in own]))
        return found

    def together(self, act: Callable[[], list]) -> list:
        """What `act` returns. Where marking fails on any rank, BadMarks on all: what was trained before is saved."""
        result, failed = [], None
        try:
            result = act()
        except (BadMarks, SampleError) as error:
            failed = error
        if self.ranks.sum([float(failed is not None)])[0]:
            raise failed if isinstance(failed, BadMarks) else BadMarks(failed or "another rank failed, and says why")
        return result

    def mark(self, answer: tuple[int, ...], sample: Sample) -> float:
        """A rewarder's mark; raises BadMarks."""
        try:
            return mark(self.rewarder, self.text(answer), sample)
        except Exception as error:  # of a user's function, all kinds
            raise BadMarks(f"--reward {self.settings.reward} failed at {sample.where}: {type(error).__name__}: {first_line(error)}") from error

    def text(self, answer: tuple[int, ...]) -> str:
        """Tokens as text, without half a character at its end."""
        return text_of(self.renderer.tokenizer, answer)

    # --- learning -----------------------------------------------------------------------------------------------------

    def agree(self, micro_batches: list[Batch], stop: StopRequest) -> tuple[float, float]:
        """As of other trainings; what it counts is forgotten where marking fails, and counted at the resume."""
        self.counted = replace(self.state)
        return super().agree(micro_batches, stop)

    def update(self, micro_batches: list[Batch], learning_rate: float, supervised: float, tokens: float) -> None:
        """Samples, marks, and does one step or several; none where no group of any rank tells anything."""
        before = self.sums["tokens"]
        for group in self.run.optimizer.param_groups:
            group["lr"] = learning_rate
        decoder = self.decoder()
        try:
            groups = self.together(lambda: [group for batch in micro_batches for group in self.sample(decoder, batch)])
        except BadMarks:
            self.state = self.counted
            raise
        broken = not math.isfinite(self.sums["entropy"])
        useful, sampled, broken = self.ranks.sum([len(groups), self.sums["tokens"] - before, broken])
        if broken:
            raise TrainingFailed("probabilities of tokens are not finite: lower --learning_rate, or try --dtype float32")
        self.has_news, self.sums["read"] = True, self.sums["read"] + tokens
        if not useful:
            return
        groups.sort(key=lambda group: len(group.prompt.ids) + len(group.sampled))
        size = self.config.batch_size
        chunks = [groups[at : at + size] for at in range(0, len(groups), size)] or [[]]  # DDP wants a backward of every rank
        for _ in range(self.settings.updates_per_batch):
            loss = torch.zeros((), device=self.ranks.device)
            for number, chunk in enumerate(chunks, start=1):
                with self.exchange(number == len(chunks)):
                    part, aux_loss = self.loss(chunk)
                    part = part / sampled + aux_loss / (len(chunks) * self.ranks.size)
                    self.run.scaler.scale(part * self.ranks.size).backward()
                loss += part.detach()
            broken = self.step(loss)
            self.finite.add(broken, [index for batch in micro_batches for index in batch.indices])
            self.finite.read()

    def loss(self, chunk: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of some groups, summed over their tokens, and the routers' auxiliary loss."""
        settings, config = self.settings, self.run.model.config
        packed = pack(chunk, config.pad_token_id, config.image_tokens, self.ranks.device)
        log_p, aux_loss = self.log_probabilities(self.model, packed)
        for group, own in zip(chunk, log_p.detach().split([len(group.sampled) for group in chunk]), strict=True):
            if group.before is None:
                group.before = own
                self.sums.update(trained=len(own), difference=float((own - own.new_tensor(group.sampled)).abs().sum()))
        if not chunk:
            return log_p.sum(), aux_loss
        answers = [values for group in chunk for values in zip(group.answers, group.advantages, group.counts, strict=True)]
        spread = [(advantage, count) for answer, advantage, count in answers for _ in answer]
        advantage, count = log_p.new_tensor(spread).unbind(1)
        ratio = (log_p - torch.cat([group.before for group in chunk])).exp()  # 1 in the first step, with the gradient of log p
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - settings.clip, 1 + settings.clip) * advantage)
        if self.reference:
            with torch.no_grad():
                reference, _ = self.log_probabilities(self.reference, packed)
            # An unbiased estimate of the divergence that is never below 0 (DeepSeekMath, equation 4).
            distance = (reference - log_p).exp() - (reference - log_p) - 1
            self.sums.update(kl=float((distance.detach() * count).sum()), kl_tokens=float(count.sum()))
            gain = gain - settings.kl * distance
        return -(gain * count).sum(), aux_loss

    def log_probabilities(self, model: torch.nn.Module, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the answers' tokens, [S], at the temperature of sampling; and the routers' auxiliary loss."""
        batch = packed.batch
        with self.run.autocast():
            out = model(batch.ids, packed.mask, packed.positions, loss_positions=packed.predictors, use_cache=False,
                        image_features=encode(self.run, batch), image_positions=batch.image_positions,
                        token_mask=batch.attention_mask if self.config.use_moe else None)  # fmt: skip
        log_p = (out.logits.float() / self.settings.temperature).log_softmax(-1)
        return log_p.gather(1, packed.targets[:, None]).squeeze(1), out.aux_loss if out.aux_loss is not None else log_p.new_zeros(())

    # --- telling ------------------------------------------------------------------------------------------------------

    def figures(self) -> tuple[dict, float, str]:
        """Means since the last log line: marks, fraction of groups with equal ones, tokens of an answer, entropy of a token, and
        of the tokens learned from how far their log-probabilities were from those when they were sampled."""
        names = ("reward", "answers", "same", "groups", "tokens", "entropy", "kl", "kl_tokens", "difference", "trained")
        sums = dict(zip(names, self.ranks.sum([float(self.sums[name]) for name in names]), strict=True)) | {"read": self.sums["read"]}
        self.sums.clear()

        def mean(name: str, of: str) -> float | None:
            return sums[name] / sums[of] if sums[of] else None

        values = {"reward": mean("reward", "answers"), "useless_groups": mean("same", "groups"), "length": mean("tokens", "answers"),
                  "entropy": mean("entropy", "tokens"), "kl": mean("kl", "kl_tokens"), "logp_difference": mean("difference", "trained")}  # fmt: skip
        text = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in values.items() if value is not None)
        samples = self.together(lambda: self.answer_some(self.run, self.decoder(), self.asked))
        return values | {"samples": samples}, sums["read"] + sums["tokens"], text

    def answer_some(self, run: Run, decoder: PackedDecoder, numbers: list[int]) -> list[dict]:
        """Greedy answers to these of the run's questions, by the first rank."""
        if not self.ranks.is_main:
            return []
        items = [item for item in run.dataset.__getitems__(numbers) if not isinstance(item, BadSample)]
        return self.answer(run, decoder, collate(items, run.model.config.pad_token_id, run.model.config.image_tokens))

    @torch.no_grad()
    def answer(self, run: Run, decoder: PackedDecoder, batch: Batch) -> list[dict]:
        """Greedy answers to a batch of the run's questions, with their marks."""
        if not batch.indices:
            return []
        prompts, features = read_questions(run, batch)
        limit, told = Sampling(max_new_tokens=self.settings.max_new_tokens, temperature=0.0), []
        texts = generate_batch(decoder, prompts, features, limit, self.renderer.im_end)
        for index, answer in zip(batch.indices, texts, strict=True):
            sample = run.dataset.samples[index]
            at = last_answer(sample.turns)
            told.append({"question": sample.turns[at - 1].content.replace(IMAGE_PLACEHOLDER, "").strip(), "where": sample.where,
                         "image": ", ".join(ref for ref in sample.images if isinstance(ref, str)),
                         "reference": sample.turns[at].content, "answer": self.text(tuple(answer)),
                         "reward": self.mark(tuple(answer), sample)})  # fmt: skip
        return told


class MarkValidation(Validation):
    """Measures the mean mark of greedy answers."""

    def __init__(self, trainer: GRPOTrainer, workers: int):
        super().__init__(trainer.run, workers)
        self.trainer = trainer

    def measure(self, stop: StopRequest) -> tuple[dict[str, float | None], list[dict], str, float]:
        """As of losses; the best weights are those of the highest mark."""
        decoder, failed = self.trainer.decoder(), []

        def marks(batch: Batch) -> list[float]:
            try:
                told = self.trainer.answer(self.run, decoder, batch)
            except (BadMarks, SampleError) as error:  # told when all ranks have come to the end
                failed.append(error)
                return [0, 0]
            return [sum(answer["reward"] for answer in told), len(told)]

        def ask() -> list[dict]:
            if failed:
                raise failed[0]
            return self.trainer.answer_some(self.run, decoder, self.asked)

        total, count = self.total(marks, stop)
        answers = self.trainer.together(ask)
        reward = total / count
        return {"eval_reward": reward}, answers, f"validation reward {reward:.4f}", -reward
