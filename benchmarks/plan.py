"""Memory and time of ppo.py before it runs: python -m benchmarks.plan --model pythia-6.9b --gpus 8 --zero 2 --bf16

Two updates of ppo.py run on the meta device, which has shapes and no data: its own generate, response_logprobs,
ScalarModel and losses, backward passes and AdamW, with buffers where DeepSpeed 0.19 has them. A ledger counts
the bytes that are alive (so the peaks are those of the real order of events) and charges every operator the longest of
three times: arithmetic, memory traffic, launch. Communication is bytes over the slower link, overlapped with nothing.

--check runs the real ppo.py on this machine's CPU at three sizes and compares.

Not counted: fragmentation, CUDA context and NCCL buffers (some GiB of each GPU), saving, loading from disk, judges.
"""

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config

import ppo
from utils.launch import fail, inner_zero_stage
from utils.models import disable_dropout

GIB = 2**30
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
LIVE = 1_050_000_000  # DeepSpeed's stage3_max_live_parameters and prefetch bucket: elements gathered at a time
SUB_GROUP = 1_000_000_000  # DeepSpeed's sub_group_size: elements of one ZeRO-3 optimizer step
ATEN = torch.ops.aten
ROWS_ONLY = {ATEN.embedding, ATEN.gather, ATEN.index, ATEN.index_select, ATEN.scatter_}  # touch part of their input


def neox(layers, width, heads, vocabulary=50432, positions=2048):
    return lambda: GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=positions)


SHAPES = {  # sizes as published with the models; vocabulary with the padding rows of the published weights
    "pythia-1b": neox(16, 2048, 8, 50304), "pythia-2.8b": neox(32, 2560, 32, 50304), "pythia-6.9b": neox(32, 4096, 32),
    "llama-70b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=28672, max_position_embeddings=8192),
    "qwen2.5-0.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, max_position_embeddings=32768, tie_word_embeddings=True),
}


# ---- Models and machine -----------------------------------------------------------------------------------


def load_config(name):
    """Config of a built-in shape, a config.json, a model folder or a Hub id."""
    if name in SHAPES:
        return SHAPES[name]()
    try:
        return AutoConfig.from_pretrained(name)
    except Exception:
        fail(f"--model {name}: no config found there. Give one of {', '.join(SHAPES)}, a config.json, a model folder "
             "or a Hub id")


def meta_model(auto_class, config, dtype):
    """A model with shapes and no data."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return disable_dropout(model)


def count(model):
    return sum(p.numel() for p in model.parameters())


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What sdpa runs on a GPU: a kernel that keeps no (T, T) scores. On meta torch would take the one that does.

    The CPU's keeps as little, but for one more copy of its output, in another layout.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as sdpa does
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    grad = torch.is_grad_enabled() and query.requires_grad
    return ATEN._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]


def tensors(args):
    flat = (x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg]))
    return [x for x in flat if isinstance(x, torch.Tensor)]


def describe(x):
    """What an operator's result depends on, hashable: shapes and strides for tensors."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.device.type
    return tuple(describe(y) for y in x) if isinstance(x, (tuple, list)) else (type(x), x)


class Ledger(TorchDispatchMode):
    """Bytes alive on the meta device, their peak, and seconds, FLOPs and operators since the last `lap`."""

    def __init__(self, machine, weights):
        super().__init__()
        self.machine, self.live, self.padded = machine, 0, True
        self.storages = {p.untyped_storage()._cdata: None for p in weights}  # counted by the Engine
        self.laps, self.known = {}, {}
        self.lap(None)

    def lap(self, name):
        """Record what happened since the last lap under this name."""
        if name:
            self.laps[name] = SimpleNamespace(
                peak=self.peak, seconds=self.seconds, flops=self.flops, operators=self.operators)
        self.peak, self.seconds, self.flops, self.operators = self.live, 0.0, 0, 0

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages or tensor.device.type != "meta":
            return

        def free(_):
            self.live -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, kwargs = func.overloadpacket, kwargs or {}
        if packet is ATEN._local_scalar_dense and args[0].is_meta:  # transformers asks if the mask is all ones
            return not self.padded
        if packet is ATEN.nonzero:  # ppo.generate asks which rows go on: all
            return torch.empty(len(args[0]), 1, dtype=torch.long, device="meta")
        key = func, describe(args), describe(list(kwargs.items()))
        if key in self.known:  # the same operator on the same shapes: no need to ask torch again
            like, flops, traffic = self.known[key]
            result = torch.empty_strided(*like[0], dtype=like[1], device="meta")
            self.see(result)
        else:
            result = func(*args, **kwargs)
            made = tensors([result])
            for tensor in made:
                self.see(tensor)
            read, flops = tensors(args), 0
            inputs = {x.untyped_storage()._cdata for x in read}
            aliases = [x.untyped_storage()._cdata in inputs for x in made]
            if packet in (ATEN.empty, ATEN.empty_like, ATEN.new_empty) or all(aliases) and not func._schema.is_mutable:
                return result  # memory that nobody touches, or a view
            if packet in ROWS_ONLY:
                read = made = [kwargs.get("src", args[2]) if packet is ATEN.scatter_ else result]
            traffic = sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in read + made)
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=result)
            if isinstance(result, torch.Tensor) and result.is_meta and not any(aliases):
                self.known[key] = ((result.shape, result.stride()), result.dtype), flops, traffic
        if packet is ATEN.logsumexp:  # torch computes exp(x - max) in a tensor of its own
            self.peak = max(self.peak, self.live + args[0].nbytes)
            traffic += 4 * args[0].nbytes
        self.flops += flops
        self.operators += 1
        self.seconds += max(flops / self.machine.flops, traffic / self.machine.bandwidth, self.machine.launch)
        return result


class FusedAdamW:
    """torch's fused AdamW, which the meta device lacks: two moments from the first step on, 28 bytes moved a weight."""

    def __init__(self, params):
        self.param_groups, self.moments = [{"params": list(params)}], None

    @torch.no_grad()
    def step(self):
        params = self.param_groups[0]["params"]
        self.moments = self.moments or [(torch.empty_like(p), torch.empty_like(p)) for p in params]
        for p, (first, second) in zip(params, self.moments):
            first.add_(p.grad)
            p.addcmul_(first, second)

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None


class Engine:
    """What DeepSpeed keeps and allocates for one trained model: weights, master weights, Adam state, gradients."""

    def __init__(self, model, args, ranks):
        self.params, self.total = list(model.parameters()), count(model)
        self.stage, self.dtype, self.offload = args.zero_stage, self.params[0].dtype, args.offload_optimizer
        self.share = math.ceil(self.total / ranks) if self.stage else self.total
        self.weights = self.empty(self.share if self.stage == 3 else self.total)
        # At ZeRO 2 in fp32, gradients are kept as whole tensors of those that touch the rank's part: the most that any
        # rank has. Else they are the rank's part, in fp32.
        ends = list(itertools.accumulate(p.numel() for p in self.params))
        self.held = self.share if self.stage == 3 else max(
            sum(end - start for start, end in zip([0, *ends], ends) if end > low and start < low + self.share)
            for low in range(0, self.total, self.share))
        self.gradients = self.bucket = None
        self.ranks, self.bucket_size = ranks, min(BUCKET, self.total) if args.lazy_buckets else BUCKET
        if self.stage == 3:
            self.bucket = self.empty(self.bucket_size)
            self.gradients = self.empty(0 if self.offload else self.share, torch.float32)
        if self.stage and self.offload:
            self.copied = self.empty(max(p.numel() for p in self.params))  # a gradient on its way to the CPU
        if self.stage == 0:
            masters = self.params
        else:
            step = min(SUB_GROUP, self.share) if self.stage == 3 else self.share
            masters = [self.empty(min(step, self.share - i), torch.float32) for i in range(0, self.share, step)]
        groups = [] if self.offload else [masters] if self.stage == 0 else [[m] for m in masters]
        self.optimizers = [FusedAdamW(group) for group in groups]
        for p in self.params:
            if self.stage:
                p.register_post_accumulate_grad_hook(self.reduce)
        for optimizer in self.optimizers:  # the first step makes Adam's moments
            self.adam(optimizer)

    def empty(self, elements, dtype=None):
        return torch.empty(int(elements), dtype=dtype or self.dtype, device="meta")

    def adam(self, optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()

    def backward(self, loss):
        if self.stage == 2:
            self.bucket, self.part = self.empty(self.bucket_size), None
        self.filled = 0
        loss.backward()
        if self.stage:
            self.flush()
        if self.stage == 2:
            if self.dtype == torch.float32 and not self.offload:
                if self.gradients is not None:
                    self.gradients.add_(self.part)
                else:
                    self.gradients = self.part
            self.bucket = self.part = None

    def reduce(self, param):
        """ZeRO 2 and 3: a gradient moves into the bucket, and a full bucket to the ranks that own it."""
        if self.filled + param.numel() > self.bucket_size:
            self.flush()
        if param.numel() <= self.bucket_size:  # a larger one is reduced where it is
            self.bucket[: param.numel()].copy_(param.grad.view(-1))
        self.filled += param.numel()
        param.grad = None

    def flush(self):
        if self.ranks > 1:
            self.empty(min(self.filled, self.bucket_size)).fill_(0)  # flattened for the all-reduce
        if self.stage == 2 and not self.offload:
            if self.dtype == torch.float32:
                self.part = self.empty(self.held) if self.part is None else self.part
            elif self.gradients is None:
                self.gradients = self.empty(self.share, torch.float32)
        self.filled = 0

    def step(self):
        if self.stage == 0 and self.ranks > 1:
            self.empty(min(BUCKET, self.total)).fill_(0)  # flattened for the all-reduce
        if self.stage == 0:
            self.optimizers[0].step()
        for optimizer in self.optimizers if self.stage else []:
            if self.stage == 2 and self.dtype == torch.bfloat16:
                gradient = self.gradients  # flat already
            else:
                gradient = self.empty(optimizer.param_groups[0]["params"][0].numel(), torch.float32).fill_(0)
            if self.stage == 2:
                self.gradients = None
            optimizer.param_groups[0]["params"][0].grad = gradient
            del gradient
            optimizer.step()
            optimizer.zero_grad()
        for p in self.params:
            p.grad = None


# ---- One update -------------------------------------------------------------------------------------------


def simulate(config, args, ranks):
    """The ledger's laps of the phases of one update of one rank, steps 3 to 9 of ppo.main with its names."""
    args.zero_stage = inner_zero_stage(args)  # every figure is of the stage that DeepSpeed has
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    policy, ref_policy = (meta_model(AutoModelForCausalLM, config, dtype) for _ in range(2))
    critic, reward_model = (
        ppo.ScalarModel(meta_model(AutoModelForSequenceClassification, config, dtype)) for _ in range(2))
    ref_policy.eval(), reward_model.eval()
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable(), critic.classifier.gradient_checkpointing_enable()
    models = policy, critic, ref_policy, reward_model
    episodes = args.batch_size // ranks
    rollout, micro, tq, tr = (
        min(args.rollout_batch_size, episodes), min(args.micro_batch_size, episodes), args.max_prompt_length,
        args.response_length)
    machine = SimpleNamespace(
        flops=args.flops * 1e12 * args.efficiency, bandwidth=args.memory_bandwidth * 1e9 * args.efficiency,
        launch=args.launch * 1e-6)
    sizes = {name: count(model) * torch.empty((), dtype=dtype).itemsize
             for name, model in (("policy", policy), ("critic", critic))}  # the frozen models have the same

    def resident(name):
        """A whole frozen model, or copy of the policy, on the device."""
        return torch.empty(sizes[name], dtype=torch.int8)

    ledger = Ledger(machine, [x for model in models for x in (*model.parameters(), *model.buffers())])
    with ledger:
        engines = {name: Engine(model, args, ranks) for name, model in (("policy", policy), ("critic", critic))}
    sdpa = unittest.mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with torch.device("meta"), sdpa, ledger:
        decoding_copy = resident("policy") if args.zero_stage == 3 else None
        frozen = None if args.offload_frozen else (resident("policy"), resident("critic"))
        queries = torch.zeros(episodes, tq, dtype=torch.long)
        query_mask, mask = torch.ones(episodes, tq, dtype=torch.bool), torch.ones(episodes, tr, dtype=torch.bool)
        forbidden, eos_ids = torch.zeros(config.vocab_size, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
        noise = torch.zeros(episodes, tr, dtype=torch.float64)
        ledger.lap(None)

        for update in range(2):  # what the first leaves behind, its logits for example, counts in the second
            # 3. rollout
            policy.eval()
            ledger.padded = args.padded and rollout > 1
            with torch.no_grad():
                ppo.generate(policy, queries[:rollout], query_mask[:rollout], noise[:rollout], 0.7, 1.0, 1.0,
                             forbidden, eos_ids, 0)
            policy.train()
            responses = torch.zeros(episodes, tr, dtype=torch.long)
            ledger.lap("rollout")

            # 4. scores
            model_on_gpu = resident("critic") if args.offload_frozen else None
            with torch.no_grad():
                ids = torch.cat([queries, responses], dim=1)[:micro].clone()
                attention_mask, shift = torch.ones_like(ids, dtype=torch.bool), torch.zeros(micro, dtype=torch.long)
                ledger.padded = args.padded and micro > 1
                scores = ppo.at_last_token(reward_model(ids, attention_mask), attention_mask)
            del model_on_gpu
            ledger.lap("reward model")

            # 5. two micro-batches, because what the first leaves behind counts in the second
            gathered = engines["policy"].empty(min(LIVE, count(policy))) if args.zero_stage == 3 else None
            model_on_gpu = resident("policy") if args.offload_frozen else None
            logprobs, ref_logprobs, values, entropies = torch.zeros(4, *responses.shape)
            rows, batch = slice(0, micro), SimpleNamespace(  # the longest micro-batch of the episodes
                batch=lambda rows: (ids, attention_mask, tr, shift), mask=mask, value_mask=mask)
            settings = SimpleNamespace(temperature=0.7, response_length=tr)
            with torch.no_grad():
                for _ in range(2):
                    ledger.lap(None)
                    logprobs[rows] = ppo.response_logprobs(policy, batch, rows, settings, forbidden, entropies)
                    ref_logprobs[rows] = ppo.response_logprobs(ref_policy, batch, rows, settings, forbidden)
                    values[rows] = ppo.response_values(critic, batch, rows, settings)
            del model_on_gpu
            ledger.lap("scoring")

            # 7. update: the policy's micro-batches and step, then the critic's
            saved = {}
            for _ in range(2):
                ledger.lap(None)
                before = ledger.live
                new_logprobs = ppo.response_logprobs(policy, batch, rows, settings, forbidden)
                pg_losses, _ = ppo.policy_losses(new_logprobs, logprobs[rows], logprobs[rows], 0.2)
                pg_loss = (pg_losses * mask[rows]).sum()
                saved["policy"] = ledger.live - before
                engines["policy"].backward(pg_loss)
            ledger.lap("policy pass")
            engines["policy"].step()
            ledger.lap("policy step")
            for _ in range(2):
                ledger.lap(None)
                before = ledger.live
                new_values = ppo.response_values(critic, batch, rows, settings)
                vf_losses, _ = ppo.value_losses(new_values, values[rows], values[rows], 0.2)
                vf_loss = (vf_losses * mask[rows]).sum()
                saved["critic"] = ledger.live - before
                engines["critic"].backward(vf_loss)
            gathered = None
            ledger.lap("critic pass")
            engines["critic"].step()
            ledger.lap("critic step")

            # 9. evaluation: response_logprobs of two models
            model_on_gpu = resident("policy") if args.offload_frozen else None
            ledger.padded = args.padded and micro > 1
            with torch.no_grad():
                for model in (policy, ref_policy):
                    ppo.response_logprobs(model, batch, rows, settings, forbidden)
            del model_on_gpu
            ledger.lap("evaluation")
    laps = ledger.laps
    for name, parts in (("training", ("policy pass", "critic pass")), ("optimizer step", ("policy step", "critic step"))):
        first, second = (laps.pop(part) for part in parts)
        laps[name] = SimpleNamespace(peak=max(first.peak, second.peak), seconds=first.seconds + second.seconds,
                                     flops=first.flops + second.flops, operators=first.operators + second.operators)
    return laps, saved, engines, sizes


def kv_cache_bytes(config, rows, tokens, itemsize):
    """Keys and values of every layer, head and token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * rows * tokens * itemsize


def seconds_per_update(laps, args, engines, sizes, ranks):
    """Seconds of each part of one update: the laps times how often they happen, and the bytes that move."""
    episodes, steps = args.batch_size // ranks, args.num_ppo_epochs * args.num_minibatches
    chunks = math.ceil(episodes / args.rollout_batch_size)
    passes = args.num_minibatches * math.ceil(episodes / args.num_minibatches / args.micro_batch_size)  # of an epoch
    backwards = args.num_ppo_epochs * passes
    times = {0: 2 * steps, 2: 2 * backwards + steps, 3: passes + 3 * backwards}[args.zero_stage]  # of all weights
    moved = sum(times * sizes[name] for name in engines) + (sizes["policy"] if args.zero_stage == 3 else 0)
    link = args.interconnect if args.nodes == 1 else args.network
    host = 4 * sizes["policy"] if args.offload_frozen else 0  # both frozen models, there and back
    if args.offload_optimizer:  # AdamW reads and writes 28 bytes a parameter in CPU memory, 4 go over the bus
        host += 32 * steps * sum(engine.share for engine in engines.values())
    return {
        "rollout": chunks * laps["rollout"].seconds,
        "scoring": passes * (laps["reward model"].seconds + laps["scoring"].seconds),
        "training": backwards * laps["training"].seconds,
        "optimizer step": steps * laps["optimizer step"].seconds,
        "communication": (ranks - 1) / ranks * moved / (link * 1e9 * args.efficiency),
        "CPU memory": host / (args.host_bandwidth * 1e9),
    }


# ---- Report -----------------------------------------------------------------------------------------------


def memory_parts(config, args, ranks, saved, engines, sizes):
    """GiB of each part of one rank: {name: (policy, critic)}, or {name: one number}."""
    itemsize, micro = sizes["policy"] // engines["policy"].total, min(args.micro_batch_size, args.batch_size // ranks)
    shares = {name: engine.share if args.zero_stage else engine.total for name, engine in engines.items()}
    state = 8 + 4 * (args.bf16 or args.zero_stage > 0)  # Adam's moments, and the fp32 master weights
    pairs = {
        "weights": {name: sizes[name] / (ranks if args.zero_stage == 3 else 1) for name in engines},
        "gradients, from backward to step" + " (in CPU memory)" * args.offload_optimizer: {name: 4 * shares[name] for name in engines},
        "optimizer state" + " (in CPU memory)" * args.offload_optimizer: {
            name: state * shares[name] for name in engines},
        "frozen: reference, reward model" + " (one at a time)" * args.offload_frozen: sizes,
        "saved for backward of a micro-batch": saved,
    }
    single = {
        "copy to decode with (ZeRO 3)": sizes["policy"] * (args.zero_stage == 3),
        "DeepSpeed's gradient bucket": BUCKET * itemsize * (args.zero_stage > 0),
        "fp32 logits of a micro-batch": 4 * config.vocab_size * args.response_length * micro,
        "KV cache of a rollout batch": kv_cache_bytes(
            config, min(args.rollout_batch_size, args.batch_size // ranks),
            args.max_prompt_length + args.response_length, itemsize),
    }
    return {name: tuple(x / GIB for x in pair.values()) for name, pair in pairs.items()}, {
        name: x / GIB for name, x in single.items() if x}


def peaks_of(laps, args, engines, sizes):
    """GiB at the peak of each phase. At the start ppo.py puts each trained model whole and in fp32 on the GPU."""
    policy, critic = engines["policy"], engines["critic"]
    fp32 = 4 * critic.total * (1 if args.bf16 or args.zero_stage != 2 else 2)  # and fp32 weights are then copied flat
    masters = 4 * policy.share * (args.bf16 or args.zero_stage > 0) * (not args.offload_optimizer)
    start = fp32 + masters + sum(x.nbytes for x in (policy.weights, policy.bucket, policy.gradients) if x is not None)
    start += sizes["policy"] * (args.zero_stage == 3)
    return {"start": start / GIB} | {name: lap.peak / GIB for name, lap in laps.items()}


def verdict(args, peaks, sizes):
    """One line: whether it fits, else what to change."""
    phase = max(peaks, key=peaks.get)
    line = f"the largest phase, {phase}, takes {peaks[phase]:.1f} of {args.gpu_memory:g} GiB"
    if peaks[phase] <= args.gpu_memory:
        return f"fits: {line}"
    if args.zero_stage == 3 and sizes["policy"] / GIB > args.gpu_memory:
        return (f"does not fit, whatever the flags: at ZeRO 3 every rank keeps a whole copy of the policy to decode "
                f"with, {sizes['policy'] / GIB:.0f} GiB, and frozen models are whole too. A case for a separate "
                "inference engine")
    remedies = [
        ("a lower --micro_batch_size",
         args.micro_batch_size > 1 and phase in ("reward model", "scoring", "training", "evaluation")),
        ("a lower --rollout_batch_size", args.rollout_batch_size > 1 and phase == "rollout"),
        ("--gradient_checkpointing", not args.gradient_checkpointing and phase == "training"),
        ("--offload_frozen", not args.offload_frozen and phase != "start"),
        ("--zero_stage 2", args.zero_stage == 0), ("--zero_stage 3", args.zero_stage == 2 and phase != "start"),
        ("--offload_optimizer", not args.offload_optimizer and args.zero_stage > 0),
        ("--bf16", not args.bf16), ("more or larger GPUs", True)]
    return f"does not fit: {line}. Try {', '.join(name for name, helps in remedies if helps)}"


def main(args):
    config, ranks = load_config(args.model), args.gpus * args.nodes
    if args.batch_size % (ranks * args.num_minibatches):
        fail(f"--batch_size {args.batch_size} must divide by {ranks} ranks x {args.num_minibatches} minibatches")
    if args.flops is None:
        args.flops = 989 if args.bf16 else 67
    laps, saved, engines, sizes = simulate(config, args, ranks)
    pairs, single = memory_parts(config, args, ranks, saved, engines, sizes)
    peaks = peaks_of(laps, args, engines, sizes)
    seconds = seconds_per_update(laps, args, engines, sizes, ranks)
    print(f"computed, not measured: ppo.py on {args.nodes} node(s) of {args.gpus} GPUs, policy "
          f"{engines['policy'].total:,} and critic {engines['critic'].total:,} parameters, "
          f"{args.batch_size // ranks} episodes a rank and update\n"
          f"assumed of a GPU: {args.gpu_memory:g} GiB, {args.flops:g} TFLOP/s, {args.memory_bandwidth:g} GB/s, links "
          f"{args.interconnect:g} GB/s within a node and {args.network:g} GB/s between nodes, {args.efficiency:.0%} of "
          f"each reached; {args.launch:g} us an operator; CPU memory {args.host_bandwidth:g} GB/s a rank\n")
    print(f"{'GiB of each rank':<52}{'policy':>10}{'critic':>10}")
    for name, (policy, critic) in pairs.items():
        print(f"{name:<52}{policy:>10.2f}{critic:>10.2f}")
    for name, size in single.items():
        print(f"{name:<52}{size:>10.2f}")
    print(f"\n{'GiB at the peak of a phase, all that is there':<52}")
    for name, peak in peaks.items():
        print(f"{name:<52}{peak:>10.2f}")
    host = args.gpus * sum(4 * engine.total + sizes[name] for name, engine in engines.items()) / GIB
    print(f"{'CPU memory of each node while the models load':<52}{host:>10.0f}")
    print(f"\n{'seconds per update':<52}")
    for name, value in (seconds | {"in all": sum(seconds.values())}).items():
        print(f"{name:<52}{value:>10.1f}")
    print(f"\n{verdict(args, peaks, sizes)}")


# ---- The check: planned against measured ------------------------------------------------------------------


CHECKS = [  # hidden size, layers, vocabulary; batch, micro-batch; prompt, response; ranks, ZeRO stage
    (256, 6, 4096, 64, 32, 96, 48, 1, 0), (512, 8, 4096, 32, 16, 96, 32, 1, 0), (768, 12, 8192, 16, 8, 96, 32, 1, 0),
    (512, 8, 4096, 32, 8, 96, 32, 2, 2),
]


def workload(folder, width, layers, vocabulary, prompt, rows):
    """Random policy and reward model and prompts of one length; the policy never samples EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("assets/sft")
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=4 * width, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, num_labels=1)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # dimension 0 of the last hidden state is 1, and EOS has a large negative weight on it
        policy.gpt_neox.final_layer_norm.weight[0], policy.gpt_neox.final_layer_norm.bias[0] = 0, 1
        head = policy.get_output_embeddings().weight
        head[:, 0] = 0
        head[tokenizer.eos_token_id, 0] = -1e4
    for name, model in (("policy", policy), ("reward_model", AutoModelForSequenceClassification.from_config(config))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids = tokenizer(" ".join(json.loads(line)["completion"] for line in open("assets/data/train.jsonl"))).input_ids
    texts = (tokenizer.decode(ids[i : i + prompt]) for i in range(0, len(ids), 7))
    texts = itertools.islice((text for text in texts if len(tokenizer(text).input_ids) == prompt), rows)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return config


def memory(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024


def measured_run(flags, out):
    """ppo.py itself, as a program; the clock that it reads between its phases notes peaks and CPU seconds as well."""
    import tyro

    before, noted, load_models = [], [], ppo.load_models

    def load(*args):
        before.append(memory("VmRSS"))  # the program without its models
        return load_models(*args)

    def clock():
        noted.append((memory("VmHWM") - before[0], time.process_time()))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        return time.time()

    ppo.load_models, ppo.time = load, SimpleNamespace(time=clock)
    ppo.main(tyro.cli(ppo.Args, args=flags))
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(noted))



def run_child(folder, name, flags, ranks, environment):
    """Peaks and CPU seconds of the second update of one run of ppo.py in a process of its own (of rank 0)."""
    launcher = [sys.executable, "-m"] if ranks == 1 else [
        str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), "--module"]
    command = [*launcher, "benchmarks.plan", "--child", str(folder / "noted.json"), *flags,
               "--output_dir", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment})
    if done.returncode:
        raise SystemExit(f"ppo.py failed:\n{done.stderr[-3000:]}")
    peaks, clock = zip(*json.loads((folder / "noted.json").read_text())[-4:])
    phases = "rollout", "scoring", "training"
    return dict(zip(phases, peaks[1:])), {
        phase: after - start for phase, start, after in zip(phases, clock, clock[1:])}


def measure_machine():
    """FLOP/s of a matrix product, bytes/s of a copy, seconds of an operator on one element; medians."""
    a, x, one = torch.ones(1024, 1024), torch.ones(2**26), torch.ones(1)

    def median(operator, repeats):
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            operator()
            seconds.append(time.process_time() - start)
        return statistics.median(seconds)

    y = torch.empty_like(x)
    product, copy_, tiny = median(lambda: a @ a, 20), median(lambda: y.copy_(x), 5), median(lambda: one + one, 1000)
    return 2 * 1024**3 / product, 2 * x.nbytes / copy_, tiny


def check(cases=CHECKS):
    """Print planned and measured memory and time of CHECKS. CPU seconds, because a machine may have other work."""
    torch.set_num_threads(1)
    for width, layers, vocabulary, batch, micro, prompt, response, ranks, stage in cases:
        flops, bandwidth, launch = measure_machine()  # each time: other work on the machine changes it
        args = parser().parse_args([])
        vars(args).update(
            batch_size=batch, micro_batch_size=micro, rollout_batch_size=micro, max_prompt_length=prompt,
            response_length=response, zero_stage=stage, num_ppo_epochs=1, padded=False,
            lazy_buckets=True, flops=flops / 1e12, memory_bandwidth=bandwidth / 1e9, launch=launch * 1e6, efficiency=1.0,
            interconnect=bandwidth / 1e9)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = workload(folder, width, layers, vocabulary, prompt, batch)
            laps, _, engines, sizes = simulate(config, args, ranks)
            flags = [f"--{key}={value}" for key, value in dict(
                sft_model=folder / "policy", reward_model=folder / "reward_model", prompts=folder / "prompts.jsonl",
                eval_prompts=folder / "prompts.jsonl", num_eval_prompts=2, gold_function=None, max_prompt_length=prompt,
                response_length=response, batch_size=batch, total_episodes=2 * batch, micro_batch_size=micro,
                rollout_batch_size=micro, num_ppo_epochs=1, lr=0, critic_lr=0, zero_stage=stage).items()]
            # Memory: every tensor above 64 KiB is mapped on its own, so that freed memory is given back at once.
            peaks, _ = run_child(folder, "memory", flags, ranks, {
                "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"})
            _, times = run_child(folder, "time", flags, ranks, {})
        planned = {"rollout": laps["rollout"].peak, "scoring": max(laps["reward model"].peak, laps["scoring"].peak),
                   "training": max(laps["training"].peak, laps["optimizer step"].peak)}
        seconds = seconds_per_update(laps, args, engines, sizes, ranks)
        seconds["training"] += seconds["optimizer step"] + seconds["communication"]
        print(f"\nhidden {width}, {layers} layers, vocabulary {vocabulary}, {engines['policy'].total:,} parameters; batch "
              f"{batch}, micro-batch {micro}, prompt {prompt}, response {response}; {ranks} rank(s), ZeRO {stage}\n"
              f"one thread in fp32: {flops / 1e9:.0f} GFLOP/s in a matrix product, {bandwidth / 1e9:.1f} GB/s in a copy, "
              f"{launch * 1e6:.1f} us for an operator on one element\n"
              f"{'':<12}{'MiB planned':>14}{'measured':>12}{'ratio':>8}{'s planned':>14}{'measured':>12}{'ratio':>8}")
        rows = [(phase, planned[phase], peaks[phase], seconds[phase], times[phase]) for phase in times]
        rows.append(("update", max(planned.values()), max(peaks.values()),
                     sum(row[3] for row in rows), sum(times.values())))
        for phase, plan, peak, plan_seconds, real_seconds in rows:
            print(f"{phase:<12}{plan / 2**20:>14.0f}{peak / 2**20:>12.0f}{plan / peak:>8.2f}{plan_seconds:>14.2f}"
                  f"{real_seconds:>12.2f}{plan_seconds / real_seconds:>8.2f}", flush=True)


def parser():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", help=f"Hub id, folder, config.json, or one of {', '.join(SHAPES)}")
    ppo_flags = flags.add_argument_group("as in ppo.py; defaults: the paper's")
    for name, default in (("batch_size", 512), ("micro_batch_size", 1), ("rollout_batch_size", 4), ("num_ppo_epochs", 4),
                          ("num_minibatches", 1), ("max_prompt_length", 512), ("response_length", 53)):
        ppo_flags.add_argument(f"--{name}", type=int, default=default)
    ppo_flags.add_argument("--zero_stage", "--zero", type=int, choices=(0, 2, 3), default=0)
    for name in ("bf16", "offload_optimizer", "offload_frozen", "gradient_checkpointing"):
        ppo_flags.add_argument(f"--{name}", action="store_true")
    machine = flags.add_argument_group("the machine; defaults: an H100 node, its data sheet's figures, and assumptions")
    for name, default, words in (
        ("gpus", 8, "of a node"), ("nodes", 1, "nodes"), ("gpu_memory", 78.0, "GiB that torch can use"),
        ("flops", None, "TFLOP/s; default 989 in bf16, 67 in fp32"), ("memory_bandwidth", 3350.0, "GB/s"),
        ("interconnect", 450.0, "GB/s of a GPU, one direction, within a node"),
        ("network", 50.0, "GB/s of a GPU, one direction, between nodes"),
        ("host_bandwidth", 50.0, "GB/s of a rank from and to CPU memory"),
        ("efficiency", 0.5, "assumed share of these that is reached"),
        ("launch", 10.0, "assumed microseconds that an operator takes at least"),
    ):
        machine.add_argument(f"--{name}", type=int if isinstance(default, int) else float, default=default, help=words)
    flags.add_argument("--check", action="store_true", help="planned against measured on this CPU")
    # On the CPU: rows of one length, and of a bucket only the pages that are written take memory.
    flags.set_defaults(padded=True, lazy_buckets=False)
    return flags


if __name__ == "__main__":
    if "--child" in sys.argv:  # a run of the check; the launcher puts its --local_rank first
        at = sys.argv.index("--child")
        measured_run(sys.argv[at + 2 :], sys.argv[at + 1])
    else:
        arguments = parser().parse_args()
        check() if arguments.check else main(arguments)
