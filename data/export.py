"""
The way out: a folder from which transformers' AutoModelForCausalLM and AutoTokenizer give the same logits and ids.

What GPT-2's class can express goes out as GPT-2. Everything else takes its code along: model.py, data/modeling_gpt.py
and the files of its mixers, which transformers executes with trust_remote_code=True.
"""
import inspect
import json
import re
import tempfile
from base64 import b64encode
from pathlib import Path

import torch

from data.checkpoints import save_pretrained, stored_config
from data.tokenizers import CharTokenizer, JsonTokenizer, TiktokenTokenizer, import_tokenizers
from model import BUILT_IN, MIXERS

PROJECT = Path(__file__).resolve().parent.parent


def export(model, tokenizer, folder):
    """Writes the folder -> (whether it needs its own code, the largest deviation of the logits; None: not checked)."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export={str(folder)!r} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with_code = False
    try:
        save_pretrained(model, folder, tokenizer.meta())
    except ValueError: # what GPT-2 lacks
        with_code = True
        save_with_code(model, folder)
    save_tokenizer(tokenizer, folder, model.config.block_size)
    return with_code, check(model, folder)


def save_with_code(model, folder):
    """config.json, model.safetensors and the code."""
    from safetensors.torch import save_file
    c = model.config
    state = {f'gpt.{k}': v.detach().cpu().contiguous() for k, v in model.state_dict().items()
             if k != 'transformer.wte.weight' or not c.tie_weights} # of two tied ones, the head
    config = dict(architectures=['ModelForCausalLM'], model_type='gpt_with_mixers',
                  auto_map=dict(AutoConfig='modeling_gpt.ModelConfig',
                                AutoModelForCausalLM='modeling_gpt.ModelForCausalLM'),
                  gpt=stored_config(c), vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
                  num_attention_heads=c.n_head, tie_word_embeddings=c.tie_weights, use_cache=True,
                  torch_dtype=str(model.lm_head.weight.dtype).removeprefix('torch.'))
    if model.bounded: # harnesses cut what is longer
        config['max_position_embeddings'] = c.block_size
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')

    lines = []
    for cls in dict.fromkeys(c.mixers()):
        if cls not in [MIXERS[name] for name in BUILT_IN]:
            source = Path(inspect.getsourcefile(cls))
            name = re.sub(r'\W', '_', f'mixer_{source.stem}')
            code = re.sub(r'^from model import', 'from .model import', source.read_text(encoding='utf-8'), flags=re.M)
            (folder / f'{name}.py').write_text(code, encoding='utf-8')
            lines.append(f'from .{name} import {cls.__name__}\nadd_mixer({cls.__name__})')
    code = (PROJECT / 'data/modeling_gpt.py').read_text(encoding='utf-8').replace('# the mixers\' files',
                                                                                  '\n'.join(lines))
    (folder / 'modeling_gpt.py').write_text(code, encoding='utf-8')
    # transformers looks for what a file imports, in functions too, and this one stays here
    code = (PROJECT / 'model.py').read_text(encoding='utf-8')
    code = re.sub(r'^( +)from data\.\w+ import \w+$', r'\1raise NotImplementedError', code, flags=re.M)
    (folder / 'model.py').write_text(code, encoding='utf-8')


def as_fast(tokenizer):
    """A Tokenizer of Hugging Face's library with the same ids."""
    library = import_tokenizers()
    models, pre, decoders = library.models, library.pre_tokenizers, library.decoders
    if isinstance(tokenizer, JsonTokenizer):
        return library.Tokenizer.from_str(tokenizer.json)
    if isinstance(tokenizer, TiktokenTokenizer):
        try:
            from transformers.convert_slow_tokenizer import TikTokenConverter
        except ImportError:
            raise ValueError(f"export={tokenizer.name}'s vocabulary needs transformers: pip install transformers"
                             ) from None
        encoding = tokenizer.encoding
        with tempfile.NamedTemporaryFile('w', suffix='.tiktoken') as file: # in tiktoken's own format
            for token, rank in encoding._mergeable_ranks.items():
                file.write(f'{b64encode(token).decode()} {rank}\n')
            file.flush()
            return TikTokenConverter(file.name, encoding._pat_str, extra_special_tokens=encoding._special_tokens
                                     ).converted()
    if isinstance(tokenizer, CharTokenizer):
        fast = library.Tokenizer(models.WordLevel(tokenizer.ids, unk_token=None))
        fast.pre_tokenizer = pre.Split(library.Regex(r'[\s\S]'), 'isolated')
        fast.decoder = decoders.Fuse()
    else: # bytes, which the library writes as printable characters
        vocab = JsonTokenizer.byte_characters()
        fast = library.Tokenizer(models.BPE(vocab, []))
        fast.pre_tokenizer, fast.decoder = pre.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    if tokenizer.eot is not None:
        fast.add_special_tokens([tokenizer.special[tokenizer.eot]])
    return fast


def save_tokenizer(tokenizer, folder, block_size):
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer takes them."""
    as_fast(tokenizer).save(str(folder / 'tokenizer.json'))
    end = tokenizer.special.get(tokenizer.eot)
    config = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
                  model_max_length=block_size)
    if end: # as GPT-2's, it begins and ends
        config |= dict(bos_token=end, eos_token=end)
    (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


@torch.no_grad()
def check(model, folder):
    """The largest difference of the logits that transformers computes from the folder; None if it is not there."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval().to(model.lm_head.weight.device)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (2, min(64, model.config.block_size)), generator=generator)
    idx = idx.to(model.lm_head.weight.device)
    deviation = (other(input_ids=idx).logits.float() - model(idx)[0].float()).abs().max().item()
    if not deviation < 0.01 * model(idx)[0].float().std().item() + 1e-4:
        raise ValueError(f"what transformers reads from {folder} differs from the model, its logits by {deviation:.3g}:"
                         " that is a mistake in this project or in the mixer's file")
    return deviation
