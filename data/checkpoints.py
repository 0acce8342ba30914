"""
Weights on disk: checkpoints, weights of another architecture, and GPT-2 in Hugging Face's layout.

A checkpoint is a dict of tensors and plain values in torch's own zip format. Opening one executes nothing.
"""
import errno
import itertools
import json
import os
import shutil
import zipfile
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import torch

from data.tokens import find_path
from model import GPT, MIXERS, GPTConfig, own_settings

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
            damaged = archive.testzip() # reads everything against its CRC-32, which torch.load does not
            if damaged:
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        for part in ('model', 'model_args'):
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(part), dict):
                raise ValueError(f"it holds no {part!r}")
    except Exception as e: # a damaged file can raise anything
        reason = str(e).split('\n')[0]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}): use another one") from e
    return checkpoint


def load_latest(folder):
    """The checkpoint that a run goes on from. If it is damaged, the ValueError names the good ones."""
    latest, best = folder / 'ckpt.pt', folder / 'best.pt'
    try:
        return load_checkpoint(best if best.exists() and not latest.exists() else latest)
    except ValueError as e:
        good = good_checkpoints(folder)
        way_out = f"good: {', '.join(good)}: copy one to ckpt.pt" if good else "there is no other"
        raise ValueError(f"{e}; {way_out}") from None


def good_checkpoints(folder):
    """A line 'PATH (step N)' for each checkpoint in the folder that opens."""
    lines = []
    for path in sorted(Path(folder).glob('*.pt')):
        with suppress(ValueError, OSError):
            lines.append(f"{path} (step {load_checkpoint(path).get('iter_num', '?')})")
    return lines


def find_weights(name):
    """The path that init_from names, here or in the project. Of a run's folder: its best checkpoint."""
    path = find_path(name)
    return next((p for p in (path / 'best.pt', path / 'ckpt.pt') if p.exists()), path)


def is_pretrained(name):
    """Whether init_from names GPT-2 or a folder in Hugging Face's layout."""
    return name in GPT2_NAMES or (find_weights(name) / 'model.safetensors').is_file()


def stored_config(config):
    """A config's fields as a checkpoint keeps them: nanoGPT's, and what differs from the defaults."""
    # a field that is left at its default may be deleted some day without locking the checkpoint out
    return {f.name: getattr(config, f.name) for f in fields(config)
            if f.name in NANOGPT_FIELDS or getattr(config, f.name) != f.default}


def stored_state(checkpoint, config):
    """The fields of train.py's State, also from nanoGPT's checkpoints, and from those of before there was a State."""
    if 'state' in checkpoint:
        return checkpoint['state']
    step, config = checkpoint['iter_num'], config | checkpoint.get('config', {})
    samples = checkpoint.get('samples', step * config['gradient_accumulation_steps'] * config['batch_size'])
    return dict(step=step, samples=samples, tokens=checkpoint.get('tokens', samples * config['block_size']),
                seconds=checkpoint.get('seconds', 0.0), best_val_loss=float(checkpoint['best_val_loss']),
                best_step=step, evals_since_best=checkpoint.get('stale', 0))


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
    """A checkpoint of train.py (or nanoGPT's) -> (model in evaluation mode, the checkpoint's dict)."""
    checkpoint = load_checkpoint(path)
    try:
        model, _ = build_model(architecture(checkpoint), evaluated_weights(checkpoint), **changes)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return model.to(device).eval(), checkpoint


def evaluated_weights(checkpoint):
    """The weights that are evaluated and sampled from: their EMA where there is one, and buffers as they are."""
    if not checkpoint.get('average'):
        return checkpoint['model']
    # a tied head is the embedding, which has an average
    return {k: v for k, v in checkpoint['model'].items() if k != 'lm_head.weight'} | checkpoint['average']


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
# The optimizer's state

def full_state(model, optimizer):
    """
    The state dicts of a model that fully_shard has shared out and of its optimizer, as one process would have them, on
    rank 0. All ranks must call.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    groups = moments.get('param_groups', ())
    index = {name: i for i, name in enumerate(name for group in groups for name in group['params'])}
    return weights, dict(state={index[name]: state for name, state in moments.get('state', {}).items()},
                         param_groups=[group | dict(params=[index[name] for name in group['params']])
                                       for group in groups])


def load_optimizer(model, optimizer, state):
    """Loads an optimizer's plain state dict, also into one whose model fully_shard has shared out."""
    groups = state['param_groups']
    if [len(g['params']) for g in groups] != [len(g['params']) for g in optimizer.param_groups]:
        # nanoGPT has two groups: the parameters' order is the same
        indices = iter([i for g in groups for i in g['params']])
        groups = [{k: v for k, v in group.items() if k != 'params'} |
                  dict(params=list(itertools.islice(indices, len(group['params']))))
                  for group in optimizer.param_groups]
        state = state | dict(param_groups=groups)
    params = [p for group in optimizer.param_groups for p in group['params']]
    if not hasattr(params[0], 'full_tensor'):
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = [name_of[id(p)] for p in params]
    state = dict(state={names[i]: s for i, s in state['state'].items()},
                 param_groups=[group | dict(params=[names[i] for i in group['params']]) for group in groups])
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout: a folder with config.json and model.safetensors

# GPT-2's Conv1D holds a Linear's matrix transposed
CONV1D = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
MLP_OF_ACTIVATION = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu='gelu', relu2='relu2')
ACTIVATION_OF_MLP = dict(gelu_tanh='gelu_new', gelu='gelu', relu2='relu2')


def load_pretrained(name, override_args=None):
    """
    GPT-2's weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (downloaded once from Hugging Face), or a local
    folder in Hugging Face's layout. override_args are changes as in build_model, and what they add is printed.
    """
    folder = download(name) if str(name) in GPT2_NAMES else Path(name)
    for file in ('config.json', 'model.safetensors'):
        if not (folder / file).is_file():
            raise OSError(f"{folder} has no {file}: expected {', '.join(GPT2_NAMES)} or a folder with config.json and "
                          "model.safetensors")
    try:
        from safetensors.torch import load_file # here: only those who load it need it
        hf = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        state = load_file(folder / 'model.safetensors')
    except Exception as e: # whatever the parsers raise on a damaged file
        raise ValueError(f"{folder} is not readable as GPT-2 in Hugging Face's layout: {e}") from e
    args = args_of_hugging_face(hf, folder)
    # names without the prefix are how the hub has them
    state = {k if k.startswith(('transformer.', 'lm_head.')) else 'transformer.' + k: v for k, v in state.items()}
    state = {k: v.t() if k.endswith(CONV1D) else v for k, v in state.items()}
    model, added = build_model(args, state, **(override_args or {}))
    for line in added:
        print(f"added    {line}")
    return model


def download(name):
    """The folder of OpenAI's weights in Hugging Face's cache."""
    from huggingface_hub import hf_hub_download
    try:
        paths = [hf_hub_download(f'openai-community/{name}', file) for file in ('config.json', 'model.safetensors')]
    except Exception as e:
        raise OSError(f"{name} could not be downloaded from Hugging Face ({type(e).__name__}): check the network, or "
                      "give a local folder that has its config.json and model.safetensors") from e
    return Path(paths[0]).parent


def args_of_hugging_face(hf, folder):
    """GPTConfig's fields for the config.json of a GPT-2; ValueError for what this GPT cannot compute."""
    if hf.get('model_type') != 'gpt2':
        raise ValueError(f"{folder}/config.json has model_type {hf.get('model_type')!r}, and only 'gpt2' can be loaded")
    activation = hf.get('activation_function', 'gelu_new')
    if activation not in MLP_OF_ACTIVATION:
        raise ValueError(f"{folder}/config.json has activation_function {activation!r}: one of "
                         f"{', '.join(MLP_OF_ACTIVATION)} is needed")
    only = dict(layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    for field, value in only.items():
        if hf.get(field, value) != value:
            raise ValueError(f"{folder}/config.json has {field}={hf[field]}, and this GPT only has {value}")
    C = hf['n_embd']
    return dict(n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=C, block_size=hf['n_positions'],
                vocab_size=hf['vocab_size'], mlp=MLP_OF_ACTIVATION[activation],
                mlp_ratio=(hf.get('n_inner') or 4 * C) / C, tie_weights=hf.get('tie_word_embeddings', True),
                dropout=hf.get('resid_pdrop', 0.1))


def save_pretrained(model, folder, meta=None):
    """
    Writes config.json and model.safetensors as transformers' GPT2LMHeadModel has them, which gives the same logits.
    meta, a dataset's or checkpoint's, goes to meta.json: sample.py takes its tokenizer.
    """
    from safetensors.torch import save_file
    c = model.config
    # the fields that GPT-2's class has a place for
    plain = GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.dropout, c.recompute, c.bias,
                      c.tie_weights, mlp=c.mlp, mlp_ratio=c.mlp_ratio if c.mlp != 'none' else 4.0,
                      pos_emb=c.pos_emb if c.pos_emb == 'none' else 'learned', narrow_residual=c.narrow_residual)
    beyond = [f"{f.name}={getattr(c, f.name)!r}" for f in fields(c) if getattr(c, f.name) != getattr(plain, f.name)]
    if c.mlp not in ACTIVATION_OF_MLP:
        beyond.append(f"mlp={c.mlp!r}")
    if beyond:
        raise ValueError(f"Hugging Face's GPT-2 class cannot express {', '.join(beyond)}")
    state = {k: v.detach().cpu() for k, v in model.state_dict().items() if k != 'lm_head.weight' or not c.tie_weights}
    if c.pos_emb == 'none': # a position table of zeros
        state['transformer.wpe.weight'] = torch.zeros(c.block_size, c.n_embd)
    if not c.bias:
        state |= {k.removesuffix('weight') + 'bias': v.new_zeros(v.size(0)) for k, v in state.items()
                  if k.endswith('weight') and '.h.' in k or k == 'transformer.ln_f.weight'}
    state = {k: (v.t() if k.endswith(CONV1D) else v).contiguous() for k, v in state.items()}
    special = None if c.vocab_size <= 50256 else 50256 # another tokenizer's special tokens are not known here
    config = dict(architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=c.vocab_size,
                  n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                  layer_norm_epsilon=1e-5, n_inner=round(c.mlp_ratio * c.n_embd),
                  activation_function=ACTIVATION_OF_MLP[c.mlp], resid_pdrop=c.dropout, embd_pdrop=c.dropout,
                  attn_pdrop=c.dropout, tie_word_embeddings=c.tie_weights, bos_token_id=special, eos_token_id=special,
                  torch_dtype=str(model.lm_head.weight.dtype).removeprefix('torch.'))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    for name, content in {'config.json': config, 'meta.json': meta}.items():
        if content:
            (folder / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
