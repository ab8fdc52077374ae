"""What the page of reliability must answer for: the promises, faults, threats and traps, each in a line.

In: nothing. Out: their texts by id. Must not know: which test proves what (the JSON files beside this one do).
"""

from __future__ import annotations

PROMISES = {
    "R1": "A resumed run ends bitwise equal to one that never stopped (same class of machine).",
    "R2": "`kill -9` at any instant loses at most `save_every` steps and needs no repair.",
    "R3": "A missing or altered part is never replaced by a fresh one.",
    "R4": "The order of the data is a pure function of seed, epoch and step; there is no sampler state to lose.",
    "R6": "Exactly one record a step, however often the run was stopped.",
    "R7": "Checkpoints of every release keep loading.",
    "R8": "Combinations that do not work fail at the start and name the alternative.",
    "R9": "Golden 50-step curves of every method lie in the repository.",
}

FAULTS = {
    "F1": "SIGKILL at random instants of a run",
    "F2": "SIGKILL before and after every write, fsync and rename of a save",
    "F3": "SIGKILL while older checkpoints are removed",
    "F4": "power loss: writes that were not fsynced are dropped",
    "F5": "disk full during a save",
    "F6": "EIO, read-only folder, stale network handle",
    "F7": "a checkpoint file is cut to 0, 50 or 99 %",
    "F8": "one bit of a file is flipped",
    "F9": "each checkpoint file is deleted in turn",
    "F10": "a checkpoint of another configuration",
    "F11": "the data changed between two starts",
    "F12": "the base model changed or moved on the hub",
    "F13": "a library changed its version since the checkpoint",
    "F14": "two processes, one run folder",
    "F15": "another run in an existing run folder",
    "F16": "SIGTERM, SIGINT, and a second one",
    "F17": "SIGTERM during a save",
    "F18": "SIGSTOP and SIGCONT; a laptop that sleeps",
    "F19": "the clock is set back or forward, or its zone changes",
    "F20": "a loss that is NaN or infinite",
    "F21": "a gradient that is NaN while the loss is finite (fp16)",
    "F22": "loss spike, zero gradient, an adapter that never moves",
    "F23": "out of memory in a step, an evaluation or a save",
    "F24": "out of memory on the host",
    "F27": "rows of wrong types, missing keys, unknown roles",
    "F28": "empty or equal answers",
    "F29": "no row, one row, fewer rows than a batch",
    "F30": "one row of ten megabytes",
    "F31": "every row is too long",
    "F32": "labels of one class; repetitions across train and held-out",
    "F33": "the reference's cache is missing, partial or of another model",
    "F39": "a worker process is killed",
    "F40": "the hub is down, refuses, is slow or breaks off",
    "F41": "no GPU, no bfloat16, no flash kernels, no bitsandbytes",
    "F42": "a poisoned cache; two runs that share one",
    "F43": "a log that cannot be written",
    "F45": "paths with spaces, other scripts, 255 bytes",
}

THREATS = {
    "S1": "weights that are pickle files",
    "S2": "pickle files inside a run folder",
    "S3": "falling back from safe to unsafe loading",
    "S4": "a model repository that brings code",
    "S9": "a tokenizer or configuration that names files outside its folder",
    "S18": "secrets in logs, reports, process titles",
    "S19": "uploads that nobody asked for",
    "S20": "a hub revision that moves during a run",
    "S23": "file modes; symlinks planted where the run writes",
}

TRAPS = {
    "T61": "the learning rate decays several times a step",
    "T62": "a resumed run sees another order or other noise",
    "T63": "a resume with a fresh optimizer or schedule",
    "T64": "rotation removes the only or the newest checkpoint",
    "T68": "fp16 overflows; skipped steps advance the schedule",
    "T69": "sampling leaves the model in evaluation mode",
}

LATER = {
    "R5": "Another number of processes gives the same order and losses: with runs on several processes.",
    "F35 to F38": "A rank that dies, hangs or sees other files: with runs on several processes.",
    "F44": "Clients that vanish, floods and large prompts: with the browser app.",
}

OPTIONAL = ("F27", "F28", "F29", "F30", "F31", "F32")
"""Faults of the data: their issue tested them; they are shown here where somebody links the test."""

REQUIRED = [
    *PROMISES,
    *(name for name in FAULTS if name not in OPTIONAL),
    *THREATS,
    *TRAPS,
]
