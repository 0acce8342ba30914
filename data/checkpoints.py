"""
Weights on disk, also for another architecture than they were trained in, and where a run is.

A checkpoint is a dict of tensors and plain values in torch's own zip format. Opening one executes nothing.
"""
import errno
import math
import os
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from data.tokens import find_path
from model import GPT, MIXERS, GPTConfig, optimizer_groups, own_settings

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


# ---------------------------------------------------------------------------------------------------------------------
# Files

def save_checkpoint(path, checkpoint):
    """Replaces path in one step: whatever happens, a whole checkpoint has this name, the old one or the new."""
    path, temporary = Path(path), Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e: # torch's writer raises RuntimeError where Python's raises OSError
        full = getattr(e, 'errno', None) == errno.ENOSPC or shutil.disk_usage(path.parent).free < 2 ** 20
        reason = 'the disk is full' if full else str(e).splitlines()[0]
        raise OSError(f"{path} could not be written: {reason}") from e
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == 'posix': # the new name itself survives a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. OSError or ValueError say what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise OSError(f"there is no checkpoint {path}: train one first, or check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip(): # reads everything against its CRC-32, which torch.load does not
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        checkpoint['model'].keys(), checkpoint['model_args'].keys() # it has both
    except Exception as e: # a damaged file can raise anything
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        others = [str(p) for p in sorted(path.parent.glob('*.pt')) if p != path and zipfile.is_zipfile(p)]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): use another one, here "
                         f"{', '.join(others) or 'there is none'}") from e
    return checkpoint


def find_weights(name):
    """The path that init_from names, here or in the project. Of a run's folder: its best checkpoint."""
    path = find_path(name)
    return next((p for p in (path / 'best.pt', path / 'ckpt.pt') if p.exists()), path)


def open_weights(name):
    """
    Trained weights as a checkpoint's dict, with what else is known of them: 'gpt2' to 'gpt2-xl' (downloaded once), a
    folder in Hugging Face's layout, a run's folder, or a checkpoint.
    """
    path = find_weights(name)
    if name in GPT2_NAMES or path.is_dir():
        from data.export import open_hugging_face # which imports this module
        return open_hugging_face(name if name in GPT2_NAMES else path)
    checkpoint = load_checkpoint(path)
    # an EMA of the weights, as runs once had: it is what their losses are of. A tied head is the embedding
    average = checkpoint.pop('average', None) or {}
    if average:
        checkpoint['model'].pop('lm_head.weight', None)
    return checkpoint | dict(model=checkpoint['model'] | average)


def stored_config(config):
    """A config's fields as a checkpoint keeps them: nanoGPT's, and what differs from the defaults."""
    # a field that is left at its default may be deleted some day without locking the checkpoint out
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.name in NANOGPT_FIELDS or getattr(config, f.name) != f.default}


def architecture(checkpoint):
    """The fields of GPTConfig that a checkpoint was trained with, also where a default has changed since."""
    args = checkpoint['model_args']
    mixer = args.get('mixer', 'attention')
    read = [name for m in (mixer if isinstance(mixer, (tuple, list)) else [mixer]) if m in MIXERS
            for name in own_settings(MIXERS[m])]
    known = [f.name for f in fields(GPTConfig) if f.name not in GPTConfig.declared_by or f.name in read]
    return {k: v for k, v in checkpoint.get('config', {}).items() if k in known} | args


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint to a model

def load_model(path, device='cpu', **changes):
    """
    The weights that open_weights finds at path -> (model in evaluation mode, the checkpoint's dict). Prints what
    changes, as in build_model, add.
    """
    checkpoint = open_weights(path)
    try:
        model, added = build_model(architecture(checkpoint), checkpoint['model'], **changes)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    for line in added:
        print(f"added    {line}")
    return model.to(device).eval(), checkpoint


def build_model(args, state, allow_changes=False, **changes):
    """
    A GPT of GPTConfig(**args) with the weights in state -> (model, a line for each addition). changes are fields that
    leave the weights their meaning: dropout, another block_size, additions that start as the identity, and
    time_mixing, which has no identity and must be trained in. Others are refused unless allow_changes.
    """
    mixer = args.get('mixer', 'attention')
    lost = [name for name in (mixer if isinstance(mixer, (tuple, list)) else [mixer]) if name not in MIXERS]
    if lost:
        raise ValueError(f"the mixer {lost[0]!r} of the checkpoint is not in model.py: give the file that defines it, "
                         f"as in python train.py or sample.py config/mixers/{lost[0]}.py")
    defaults = vars(GPTConfig())
    # what a model.py without the field cannot do; a field that is off says nothing
    unknown = sorted(k for k, v in args.items() if k not in defaults and v and v != 'none')
    if unknown:
        raise ValueError(f"the checkpoint's architecture has {first_few(unknown)}, which this model.py lacks")
    args = defaults | {k: v for k, v in args.items() if k in defaults}
    safe = {'dropout', 'recompute', 'narrow_residual', 'block_size', 'bias', 'tie_weights', 'time_mixing',
            'time_weighting'}
    if (args['pos_emb'], changes.get('pos_emb')) in (('none', 'relative'), ('learned', 'learned+relative')):
        safe.add('pos_emb')
    others = [f"{k}={v!r} instead of {args[k]!r}" for k, v in changes.items() if v != args[k] and k not in safe]
    if others and not allow_changes:
        way_out = "leave it as it was"
        with suppress(ValueError): # offered only if the weights fit
            build_model(args, state, True, **changes)
            way_out += ", or --allow_changes=True"
        raise ValueError(f"{first_few(others)} changes what the checkpoint's weights mean: {way_out}")
    config = args | changes
    model = GPT(GPTConfig(**config | dict(block_size=max(args['block_size'], config['block_size']))))
    grow = any(k in changes for k in ('time_weighting', 'pos_emb', 'bias', 'tie_weights'))
    added = [f"{name}, starting as the identity" for name in load_weights(model, state, grow)]
    if config['time_mixing'] != args['time_mixing']:
        added.append(f"time_mixing={config['time_mixing']}, which has no identity: the logits change")
    return crop_block_size(model, config['block_size']), added


def load_weights(model, state, grow=False):
    """
    Loads a state dict by name: this project's, nanoGPT's or GPT-2's. With grow=True, parameters that start as the
    identity may be missing; returns their names. Anything else that does not fit raises ValueError with the list.
    """
    own, tied = model.state_dict(), model.config.tie_weights
    if tied:
        del own['lm_head.weight'] # the embedding's
    state = {k.removeprefix('module.').removeprefix('_orig_mod.'): v for k, v in state.items()}
    # old checkpoints of GPT-2 hold causal masks under these names
    masks = {k for k, v in state.items()
             if k.endswith('.attn.masked_bias') or k.endswith('.attn.bias') and v.dim() == 4}
    state = {k: v for k, v in state.items() if k in own or k not in masks}
    wte, head = state.get('transformer.wte.weight'), state.get('lm_head.weight')
    if wte is not None and head is None and not tied:
        state['lm_head.weight'] = wte # untying starts from the tied matrix
    if tied and head is not None and wte is not None:
        if head.shape != wte.shape or not torch.equal(head, wte):
            raise ValueError("the checkpoint's head differs from its embedding: set tie_weights=False")
        del state['lm_head.weight']
    surplus, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    if surplus:
        raise ValueError(f"the checkpoint has parameters that this architecture lacks: {first_few(surplus)}")
    identity = ('.attn.relative', '.attn.weight', '.attn.alpha', '.attn.beta', '.bias')
    lost = [k for k in missing if not (grow and k.endswith(identity))]
    if lost:
        raise ValueError(f"the checkpoint lacks parameters that this architecture has: {first_few(lost)}")
    wrong = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in state.items() if v.shape != own[k].shape]
    if wrong:
        raise ValueError(f"the checkpoint's parameters have other shapes than this architecture's: {first_few(wrong)}; "
                         "a block_size beyond the checkpoint's needs an architecture without tables of positions")
    for k, v in state.items():
        own[k].copy_(v)
    return missing


def crop_block_size(model, block_size):
    """The model with every table along time shortened to block_size: start from GPT-2's 1024 and train at 256."""
    if block_size > model.config.block_size:
        raise ValueError(f"block_size={block_size} is longer than the {model.config.block_size} positions of these "
                         f"weights: use block_size={model.config.block_size} or less")
    if block_size == model.config.block_size:
        return model
    weight = model.lm_head.weight
    with weight.device:
        cropped = GPT(replace(model.config, block_size=block_size)).to(weight.dtype)
    old = model.state_dict()
    for k, v in cropped.state_dict().items():
        v.copy_(old[k][tuple(slice(n) for n in v.shape)])
    return cropped.train(model.training)


def first_few(names, most=8):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ', '.join(names[:most]) + more


# ---------------------------------------------------------------------------------------------------------------------
# Where a run is

@dataclass(eq=False)
class State:
    """
    What training changes: the network, the optimizer, float16's scaler, and how far the run is. A checkpoint stores and
    restores it as a whole.
    """
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0 # steps done
    samples: int = 0 # sequences in them
    tokens: int = 0
    seconds: float = 0.0 # of training, without evaluations
    best_val_loss: float = math.inf
    best_step: int = 0 # of that loss
    evals_since_best: int = 0
    evaluated: int = -1 # the step that was last evaluated
    mark: str = '' # what best_val_loss was measured on

    def __post_init__(self):
        self.first_step, self.first_samples = self.step, self.samples # of this process

    def count(self, samples, length):
        """A step is done."""
        self.step, self.samples, self.tokens = self.step + 1, self.samples + samples, self.tokens + samples * length

    def judge_by(self, mark):
        """A loss of other validation windows is no mark for those to come: it begins anew -> lines to show."""
        before, self.mark = self.mark, mark
        if before in ('', mark):
            return []
        self.best_val_loss, self.best_step, self.evals_since_best, self.evaluated = math.inf, 0, 0, -1
        return ["note     the validation data or windows are others than before: the lowest loss begins anew"]

    def keep_score(self, loss):
        """Of an evaluation's loss: whether it is the best so far, or that one again, as a resumed run repeats it."""
        better = loss < self.best_val_loss or loss == self.best_val_loss and self.step == self.best_step
        self.evaluated, self.evals_since_best = self.step, 0 if better else self.evals_since_best + 1
        if better:
            self.best_val_loss, self.best_step = loss, self.step
        return better

    def to_checkpoint(self, config, meta):
        """The dict to save. Where fully_shard shares out the weights, all processes must call."""
        weights, moments = full_state(self.model, self.optimizer)
        counters = {f.name: getattr(self, f.name) for f in fields(self)[3:]}
        return dict(format=3, model=weights, optimizer=moments, scaler=self.scaler.state_dict(), state=counters,
                    model_args=stored_config(self.model.config), config=config, meta=meta,
                    iter_num=self.step, best_val_loss=self.best_val_loss) # as nanoGPT's readers expect them

    def restore(self, checkpoint, config):
        """All but the weights, also of checkpoints of nanoGPT and of earlier versions -> lines to show."""
        notes, before = [], checkpoint['config'].get('block_size', config['block_size'])
        vars(self).update(stored_state(checkpoint, config))
        if config['sampling'] == 'epoch' and before != config['block_size']: # epochs are counted in windows
            self.samples = self.samples * before // config['block_size']
            notes.append("note     block_size has changed within an epoch, whose windows are others now: some of its "
                         "tokens may come twice")
        if config['decay_lr'] and config['lr_decay_iters'] < config['max_iters']:
            notes.append(f"note     the learning rate stays at min_lr from step {config['lr_decay_iters']} on: to extend "
                         f"its decay, --lr_decay_iters={config['max_iters']}")
        self.first_step, self.first_samples = self.step, self.samples
        self.scaler.load_state_dict(checkpoint.get('scaler') or self.scaler.state_dict())
        load_optimizer(self.model, self.optimizer, checkpoint['optimizer'], architecture(checkpoint))
        if checkpoint.get('average'):
            notes.append("note     the run goes on without the EMA of its weights")
        return notes


def stored_state(checkpoint, config):
    """The counters of State, also from nanoGPT's checkpoints, and from those of before there was a State."""
    if 'state' in checkpoint:
        return checkpoint['state']
    step, config = checkpoint['iter_num'], config | checkpoint.get('config', {})
    samples = checkpoint.get('samples', step * config['gradient_accumulation_steps'] * config['batch_size'])
    return dict(step=step, samples=samples, tokens=checkpoint.get('tokens', samples * config['block_size']),
                seconds=checkpoint.get('seconds', 0.0), best_val_loss=float(checkpoint['best_val_loss']),
                best_step=step, evals_since_best=checkpoint.get('stale', 0))


def is_sharded(model):
    return hasattr(model.lm_head.weight, 'full_tensor')


def full_state(model, optimizer):
    """The state dicts of a model and its optimizer as one process would have them; of shared ones on rank 0 alone."""
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    groups = moments.get('param_groups', ())
    index = {name: i for i, name in enumerate(name for group in groups for name in group['params'])}
    return weights, dict(state={index[name]: state for name, state in moments.get('state', {}).items()},
                         param_groups=[group | dict(params=[index[name] for name in group['params']])
                                       for group in groups])


def load_optimizer(model, optimizer, stored, args):
    """
    Loads an optimizer's plain state dict, which was saved with a model of GPTConfig(**args). Moments follow their
    parameters by name: shortened as these are, and none for one that was added. The groups' settings stay as they are.
    """
    with torch.device('meta'):
        before = GPT(GPTConfig(**{f.name: args[f.name] for f in fields(GPTConfig) if f.name in args}))
    # in the order of the groups. nanoGPT's two have the same order
    names = [name for group in optimizer_groups(before).values() for name, _ in group]
    indices = [i for group in stored['param_groups'] for i in group['params']]
    moments = {name: stored['state'][i] for name, i in zip(names, indices) if i in stored['state']}
    cuts = {name: tuple(map(slice, p.shape)) for name, p in model.named_parameters()}
    moments = {name: {key: v[cuts[name]].contiguous() if v.dim() == len(cuts[name]) else v # AdamW's kernel reads them
                      for key, v in state.items()} for name, state in moments.items() if name in cuts} # as they lie
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = [group | dict(params=[name_of[id(p)] for p in group['params']]) for group in optimizer.param_groups]
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
        set_optimizer_state_dict(model, optimizer, dict(state=moments, param_groups=groups),
                                 options=StateDictOptions(full_state_dict=True))
        return
    index = {name: i for i, name in enumerate(name for group in groups for name in group['params'])}
    groups = [group | dict(params=[index[name] for name in group['params']]) for group in groups]
    optimizer.load_state_dict(dict(state={index[name]: state for name, state in moments.items()}, param_groups=groups))
