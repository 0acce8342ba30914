"""
The way out: a folder from which transformers' AutoModelForCausalLM and AutoTokenizer give the same logits and ids.

What GPT-2's class can express goes out as GPT-2. Everything else takes its code along: model.py, data/modeling_gpt.py
and the files of its mixers, which transformers executes with trust_remote_code=True.
"""
import copy
import inspect
import json
import re
import tempfile
from base64 import b64encode
from pathlib import Path

import torch

from data.checkpoints import save_pretrained, stored_config
from data.tokenizers import EOT, CharTokenizer, JsonTokenizer, TiktokenTokenizer, import_tokenizers
from model import BUILT_IN, MIXERS

PROJECT = Path(__file__).resolve().parent.parent


def export(model, tokenizer, folder):
    """Writes the folder -> (whether it needs its own code, the largest deviation of the logits; None: not checked)."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export={str(folder)!r} is not empty: name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export-', dir=folder.parent) as parent: # whole, or not there at all
        new = Path(parent) / re.sub(r'\W', '_', folder.name) # transformers makes a module of it
        new.mkdir()
        with_code = False
        try:
            save_pretrained(model, new, tokenizer.meta())
        except ValueError: # what GPT-2 lacks
            with_code = True
            save_with_code(model, new)
        config = json.loads((new / 'config.json').read_text(encoding='utf-8'))
        config |= dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot) # where generate stops
        write_json(new / 'config.json', config)
        if tokenizer.name != 'pictures': # which are no text
            save_tokenizer(tokenizer, new, model.config.block_size)
        deviation = check(model, new)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    return with_code, deviation


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


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
    write_json(folder / 'config.json', config)

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
    """A Tokenizer of Hugging Face's library with the same ids. Of the special tokens only eot is one."""
    library = import_tokenizers()
    models, pre, decoders = library.models, library.pre_tokenizers, library.decoders
    if isinstance(tokenizer, JsonTokenizer): # without what would add tokens that training never saw, or cut
        return library.Tokenizer.from_str(json.dumps(tokenizer.parts | dict(post_processor=None, truncation=None,
                                                                            padding=None)))
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
            fast = TikTokenConverter(file.name, encoding._pat_str, extra_special_tokens={}).converted()
        others = range(fast.get_vocab_size(), tokenizer.vocab_size)
        fast.add_special_tokens([EOT if i == tokenizer.eot else f'<|unused_{i}|>' for i in others])
        return fast
    if isinstance(tokenizer, CharTokenizer):
        fast = library.Tokenizer(models.WordLevel(tokenizer.ids, unk_token=None))
        fast.pre_tokenizer = pre.Split(library.Regex(r'[\s\S]'), 'isolated')
        fast.decoder = decoders.Fuse()
    else: # bytes, which the library writes as printable characters
        fast = library.Tokenizer(models.BPE(JsonTokenizer.byte_characters(), []))
        fast.pre_tokenizer, fast.decoder = pre.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    if tokenizer.eot is not None:
        fast.add_special_tokens([EOT])
    return fast


def save_tokenizer(tokenizer, folder, block_size):
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer takes them."""
    fast = as_fast(tokenizer)
    fast.save(str(folder / 'tokenizer.json'))
    known = tokenizer.decode(range(min(256, tokenizer.vocab_size))) # some text that it can write
    text = known + (tokenizer.special[tokenizer.eot] if tokenizer.eot is not None else '') + known[::-1]
    expected = tokenizer.encode(known) + [tokenizer.eot] * (tokenizer.eot is not None) + tokenizer.encode(known[::-1])
    if fast.encode(text, add_special_tokens=False).ids != expected:
        raise ValueError("this tokenizer cannot be written as a tokenizer.json with the same ids")
    end = tokenizer.special.get(tokenizer.eot)
    config = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
                  model_max_length=block_size)
    if end: # as GPT-2's, it begins and ends
        config |= dict(bos_token=end, eos_token=end)
    write_json(folder / 'tokenizer_config.json', config)


@torch.no_grad()
def check(model, folder):
    """The largest difference of the logits that transformers computes from the folder; None if it is not there."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval().float()
    own = copy.deepcopy(model).cpu().float()
    idx = torch.randint(own.config.vocab_size, (2, min(64, own.config.block_size)),
                        generator=torch.Generator().manual_seed(0))
    expected = own(idx)[0]
    deviation = (other(input_ids=idx).logits - expected).abs().max().item()
    if not deviation < 1e-3 * expected.std().item() + 1e-4:
        raise ValueError(f"what transformers reads from {folder} differs from the model, its logits by {deviation:.3g}:"
                         " that is a mistake in this project or in the mixer's file")
    return deviation
