"""Vocabularies that Hugging Face's tokenizers describe, against the library, and prepare.py with them."""
import codecs
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data.tokenizers import (EOT, GPT2, CharTokenizer, JsonTokenizer, TiktokenTokenizer, difference, load_tokenizer,
                             tokenizer_of)
from data.tokens import DataError, load_meta
from helpers import corpus, flags, run, train, well, write_data

library = pytest.importorskip('tokenizers')
TEXT = corpus() + 'naïve café, 数据, 👍🏽\n\n    indented\ttabs ' * 3
TRAINED = JsonTokenizer.train([TEXT], 300)


def falling_back(prepend=False):
    """A tokenizer as Llama's: words begin with U+2581, and what it lacks is written in bytes."""
    vocab = {'<unk>': 0, '</s>': 1} | {f'<0x{b:02X}>': 2 + b for b in range(256)}
    vocab |= {piece: 258 + i for i, piece in enumerate(['\u2581', 'a', 't', 'c', 'at', '\u2581c', '\u2581cat'])}
    merges = [('a', 't'), ('\u2581', 'c'), ('\u2581c', 'at')]
    fast = library.Tokenizer(library.models.BPE(vocab, merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    steps = [library.normalizers.Prepend('\u2581')] * prepend + [library.normalizers.Replace(' ', '\u2581')]
    fast.normalizer = library.normalizers.Sequence(steps)
    d = library.decoders
    fast.decoder = d.Sequence([d.Replace('\u2581', ' '), d.ByteFallback(), d.Fuse()])
    fast.add_special_tokens(['<unk>', '</s>'])
    return fast.to_str()


@settings(deadline=None)
@given(st.one_of(st.text(), st.text(alphabet='the cat sat. été\n👍')), st.sampled_from(['trained', 'falling back']))
def test_round_trip(text, kind):
    """The library's ids; the text again; the bytes of each id add up to it; special tokens in text are text."""
    tokenizer = TRAINED if kind == 'trained' else JsonTokenizer(falling_back())
    if kind != 'trained' and '\u2581' in text: # which stands for a space there
        return
    ids = tokenizer.encode_ordinary(text)
    assert ids == tokenizer.fast.encode(text, add_special_tokens=False).ids
    written = text.encode()
    assert tokenizer.decode_bytes(ids) == written and tokenizer.decode(ids) == text
    assert tokenizer.n_bytes(ids) == len(written) and tokenizer.n_bytes([-1, *ids]) == len(written)


def test_the_end_of_a_document():
    for tokenizer, end in (TRAINED, EOT), (JsonTokenizer(falling_back()), '</s>'):
        ids = tokenizer.encode(f'cat{EOT}cat')
        assert ids.count(tokenizer.eot) == 1 and tokenizer.special[tokenizer.eot] == end
        assert tokenizer.decode(ids) == 'catcat' and tokenizer.decode(ids, special=True) == f'cat{end}cat'
        assert tokenizer.n_bytes(ids) == 6
        assert tokenizer.eot not in tokenizer.encode_ordinary(end)


def test_metadata_makes_it_again():
    again = load_tokenizer(json.loads(json.dumps(TRAINED.meta())))
    assert again.encode(TEXT) == TRAINED.encode(TEXT) and again.vocab_size == TRAINED.vocab_size


def test_characters_of_several_tokens_are_streamed():
    decoder = codecs.getincrementaldecoder('utf-8')()
    ids = TRAINED.encode('👍')
    pieces = [decoder.decode(TRAINED.decode_bytes([i])) for i in ids]
    assert len(ids) > 1 and pieces[:-1] == [''] * (len(ids) - 1) and pieces[-1] == '👍'


def with_id_beyond(text):
    return text.replace('"id":0', f'"id":{2 ** 32}')


def without_fallback():
    fast = library.Tokenizer(library.models.WordPiece({'[UNK]': 0, 'cat': 1}, unk_token='[UNK]'))
    fast.decoder = library.decoders.WordPiece()
    return fast.to_str()


@pytest.mark.parametrize('text, words', [
    ('{', 'damaged'), ('', 'damaged'), ('[]', 'damaged'), (TRAINED.json[:-100], 'damaged'),
    (with_id_beyond(TRAINED.json), 'damaged'), (without_fallback(), 'cannot write every text')],
    ids=['brace', 'empty', 'list', 'cut', 'id', 'no fallback'])
def test_refused(tmp_path, text, words):
    (tmp_path / 'tokenizer.json').write_text(text)
    (tmp_path / 'book.txt').write_text(TEXT)
    done = run('data/text/prepare.py', flags(input=tmp_path / 'book.txt', tokenizer=tmp_path / 'tokenizer.json',
                                             out=tmp_path / 'out'))
    said = done.stderr.decode()
    assert done.returncode == 2 and said.startswith('error: ') and said.count('\n') == 1 and words in said
    assert 'tokenizer.json' in said and not (tmp_path / 'out').exists()


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path):
    parts = json.loads(TRAINED.json)
    parts['normalizer'] = {'type': 'Lowercase'}
    (tmp_path / 'lower.json').write_text(json.dumps(parts))
    (tmp_path / 'book.txt').write_text('UPPER ' * 100)
    done = run('data/text/prepare.py', flags(input=tmp_path / 'book.txt', tokenizer=tmp_path / 'lower.json',
                                             out=tmp_path / 'out'))
    assert done.returncode == 2 and 'does not give back the text' in done.stderr.decode()
    (tmp_path / 'prepend.json').write_text(falling_back(prepend=True))
    done = run('data/text/prepare.py', flags(input=tmp_path / 'book.txt', tokenizer=tmp_path / 'prepend.json',
                                             out=tmp_path / 'out'))
    assert done.returncode == 2 and 'does not give back the text' in done.stderr.decode() # a space more a piece
    with pytest.raises(DataError, match='at least 257'):
        JsonTokenizer.train(['a'], 200)


def normalizing(kind):
    return json.dumps(json.loads(TRAINED.json) | dict(normalizer={'type': kind}))


def test_changes_far_behind_the_first_tokens(tmp_path):
    """Said from the start, and refused where they strike: at the end of a text of more than a million tokens."""
    (tmp_path / 'nfc.json').write_text(normalizing('NFC'))
    (tmp_path / 'book.txt').write_text('a b\n' * 330_000 + 'the end: e\u0301\n', encoding='utf-8')
    settings = dict(input=tmp_path / 'book.txt', tokenizer=tmp_path / 'nfc.json', out=tmp_path / 'out')
    done = run('data/text/prepare.py', flags(**settings))
    said = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and said.startswith('error: ') and "'e\u0301\\n' becomes '\u00e9\\n'" in said
    assert b"warning: the tokenizer 'tokenizers' changes some texts, such as 'e\\u0301'" in done.stdout
    assert not list(tmp_path.glob('out/*'))
    (tmp_path / 'book.txt').write_text('a b\n' * 3000) # which it leaves as it is
    assert 'warning: ' in well(run('data/text/prepare.py', flags(**settings)))
    (tmp_path / 'nfc.json').write_text(TRAINED.json)
    assert 'warning: ' not in well(run('data/text/prepare.py', flags(**settings)))


def test_changes_in_a_stream(tmp_path, capsys, monkeypatch):
    """Hours of work are not lost for one document: it is counted."""
    from data import stream
    monkeypatch.setattr(stream, 'BATCH', 10)

    class Stream(list):
        def state_dict(self):
            return 0

    documents = Stream(dict(text='e\u0301' if i == 55 else 'the cat') for i in range(100))
    arguments = {}, JsonTokenizer(normalizing('NFC')), 'text', 0, 0, 0.1, 1
    with pytest.raises(DataError, match='no token that ends|does not give back'):
        stream.write_shards(tmp_path / 'at once', Stream(documents[55:]), *arguments)
    stream.write_shards(tmp_path / 'late', documents, *arguments)
    assert 'warning: the tokenizer has changed the text of 1 documents' in capsys.readouterr().out


def test_what_a_tokenizer_lacks_is_a_line(tmp_path):
    """Characters in its tokens that stand for no byte, bytes that have no token, and what the library refuses."""
    parts = json.loads(TRAINED.json)
    parts['model']['vocab']['a b'] = len(parts['model']['vocab'])
    tokenizer = JsonTokenizer(json.dumps(parts))
    assert tokenizer.token_bytes[-1] == b'a b' and tokenizer.decode(tokenizer.encode('cat')) == 'cat'
    fast = library.Tokenizer(library.models.WordLevel({'a': 0, 'b': 1}, unk_token='[UNK]'))
    fast.pre_tokenizer, fast.decoder = library.pre_tokenizers.ByteLevel(), library.decoders.ByteLevel()
    words = fast.to_str()
    del parts['model']['vocab']['Z']
    with pytest.raises(DataError, match="cannot write the text .*take another"):
        JsonTokenizer(words).encode('z')
    for content, text in (words, 'zzz' * 99), (json.dumps(parts), 'xZx' * 99):
        (tmp_path / 'tokenizer.json').write_text(content)
        (tmp_path / 'book.txt').write_text(text)
        done = run('data/text/prepare.py', flags(input=tmp_path / 'book.txt', tokenizer=tmp_path / 'tokenizer.json',
                                                 out=tmp_path / 'out'))
        said = done.stderr.decode()
        assert done.returncode == 2 and said.startswith('error: ') and said.count('\n') == 1, said


# ---- whose tokenizer is it?

needs_gpt2 = pytest.mark.skipif('TIKTOKEN_CACHE_DIR' not in os.environ, reason='needs a vocabulary that is downloaded')


def bare(folder, ids):
    """Token files that say nothing of their tokenizer."""
    folder.mkdir(exist_ok=True)
    for split in 'train', 'val':
        np.array(ids, '<u2').tofile(folder / f'{split}.bin')
    return folder


@needs_gpt2
def test_bare_files_are_known_by_their_ids(tmp_path):
    """GPT-2's from any token on; of other vocabularies none, small or large, whatever the size that meta tells."""
    gpt2, text = TiktokenTokenizer('gpt2'), TEXT * 3 + 'And then: "ßtraße", 東京。\n\n' * 9
    ids = gpt2.encode(text + EOT + TEXT + EOT + text)
    for first in 0, 1, 2, 33, 500:
        assert tokenizer_of(bare(tmp_path / 'd', ids[first:])) == GPT2
    rng = np.random.default_rng(0)
    characters = CharTokenizer.from_text([text])
    others = [characters.encode(text), TRAINED.encode(text), JsonTokenizer.train([text], 2000).encode(text),
              list(text.encode()), rng.integers(5000, size=6000), rng.integers(50257, size=6000), range(200), [0] * 99]
    for ids in others:
        assert tokenizer_of(bare(tmp_path / 'd', ids)) == {}
    assert tokenizer_of(bare(tmp_path / 'd', range(200)), characters.meta()) == {} # not of weights that know fewer
    assert tokenizer_of(bare(tmp_path / 'd', others[0]), characters.meta()) == characters.meta()
    assert tokenizer_of(bare(tmp_path / 'd', others[1]), TRAINED.meta()) == TRAINED.meta()
    (tmp_path / 'd/meta.json').write_text('{"vocab_size": 5000}')
    assert tokenizer_of(bare(tmp_path / 'd', [i for i in gpt2.encode(text) if i < 5000])) == {}


def test_a_folders_own_files_go_first(tmp_path):
    """meta.json, tokenizer.json, the older pair of files; of weights, the size of GPT-2's; nothing is not known."""
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "vocab_size": 300}')
    assert tokenizer_of(tmp_path) == {}
    TRAINED.fast.model.save(str(tmp_path))
    pair = load_tokenizer(tokenizer_of(tmp_path))
    assert pair.encode(TEXT + EOT) == TRAINED.encode(TEXT + EOT) and pair.token_bytes == TRAINED.token_bytes
    other = JsonTokenizer.train([TEXT[::-1]], 290)
    (tmp_path / 'tokenizer.json').write_text(other.json)
    assert load_tokenizer(tokenizer_of(tmp_path)).encode(TEXT) == other.encode(TEXT)
    tokenizer = write_data(tmp_path)
    assert tokenizer_of(tmp_path) == tokenizer.meta()
    for name in 'meta.json', 'tokenizer.json', 'train.bin', 'val.bin', 'vocab.json':
        (tmp_path / name).unlink()
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "vocab_size": 50257}')
    assert tokenizer_of(tmp_path) == GPT2
    (tmp_path / 'tokenizer.json').write_text(without_fallback())
    with pytest.raises(DataError, match='tokenizer.json: .*cannot write every text'):
        tokenizer_of(tmp_path)


def test_differences_are_called_what_they_are():
    with_eot, without = CharTokenizer('abc', eot=True).meta(), CharTokenizer('abc').meta()
    assert 'another eot, the token that ends a document: in the dataset, not in the weights' in difference(with_eot, without)
    assert 'another eot, the token that ends a document: in the weights, not in the dataset' in difference(without, with_eot)
    assert difference(with_eot, with_eot) == difference({}, with_eot) == difference(with_eot, {}) == ''
    assert "the characters 'abd', and the weights" in difference(CharTokenizer('abd').meta(), without)
    assert "the tokenizer 'char', and" in difference(without, TRAINED.meta())
    assert difference(TRAINED.meta(), dict(TRAINED.meta(), json=json.dumps(TRAINED.parts, indent=3))) == ''
    assert 'another tokenizer.json' in difference(TRAINED.meta(), JsonTokenizer.train([TEXT[::-1]], 300).meta())
    picture = dict(tokenizer='pictures', height=2, width=2, palette=[[0], [9]])
    assert 'the palette' in difference(picture, dict(picture, palette=[[0], [8]]))


def test_halves_of_characters(tmp_path):
    """jsonl can have lone surrogates, which UTF-8 cannot: they become ?."""
    (tmp_path / 'a.jsonl').write_text('{"text": "one \\ud83d two"}\n' * 60)
    for tokenizer in 'bytes', 'char', 'bpe':
        well(run('data/text/prepare.py', flags(input=tmp_path / 'a.jsonl', tokenizer=tokenizer, out=tmp_path / 'out')))
        ids = np.fromfile(tmp_path / 'out/train.bin', '<u2')
        assert load_tokenizer(load_meta(tmp_path / 'out')).decode(ids).startswith('one ? twoone ? two')
    assert TRAINED.encode_batch(['\ud83d']) == [TRAINED.encode('?')]


def test_from_text_to_samples(tmp_path):
    """prepare.py trains a vocabulary, of what is not held out; the folder and the checkpoint carry it."""
    text = TEXT + 'zzq ' * 100 # at the end, which is held out
    (tmp_path / 'book.txt').write_text(text, encoding='utf-8', newline='')
    well(run('data/text/prepare.py', flags(input=tmp_path / 'book.txt', tokenizer='bpe', vocab_size=300,
                                           out=tmp_path / 'data')))
    meta = load_meta(tmp_path / 'data')
    tokenizer = load_tokenizer(meta)
    ids = [np.fromfile(tmp_path / f'data/{split}.bin', '<u2') for split in ('train', 'val')]
    assert tokenizer.decode(np.concatenate(ids)) == text and meta['vocab_size'] == tokenizer.vocab_size <= 300
    assert b'zzq' not in tokenizer.token_bytes
    said = train(tmp_path, max_iters=2, eval_interval=2, eval_iters=1000)
    assert f'tokenizers, vocabulary {meta["vocab_size"]}' in said and 'bits per byte' in said
    lines = [json.loads(line) for line in (tmp_path / 'out/metrics.jsonl').read_text().splitlines()]
    last = [line for line in lines if 'val_loss' in line][-1]
    targets = ids[1][1:][:(len(ids[1]) - 1) // 16 * 16]
    expected = last['val_loss'] * len(targets) / len(tokenizer.decode_bytes(targets)) / math.log(2)
    assert last['bits_per_byte'] == pytest.approx(expected, rel=1e-6)
    (tmp_path / 'data/meta.json').unlink()
    text = well(run('sample.py', flags(out_dir=tmp_path / 'out', num_samples=1, max_new_tokens=9, start='the été')))
    assert text.startswith('the été')
    other = dict(meta, json=JsonTokenizer.train([TEXT[::-1]], meta['vocab_size']).json)
    (tmp_path / 'data/meta.json').write_text(json.dumps(other))
    done = run('train.py', flags(out_dir=tmp_path / 'out', init_from='resume', max_iters=4))
    assert done.returncode == 2 and 'another tokenizer.json than the weights' in done.stderr.decode()


@pytest.fixture
def stories(tmp_path):
    """1,000 documents in two files, with the text in a field of another name."""
    for f in range(2):
        with open(tmp_path / f'{f}.jsonl', 'w') as file:
            for i in range(500):
                file.write(json.dumps({'n': i, 'story': f'Story {500 * f + i}: the cat sat, été.'}) + '\n')
    return ['--source=json', f'--data_files={tmp_path}/*.jsonl', f'--out={tmp_path / "out"}', '--val_fraction=0.01']


def test_any_dataset_of_the_hub(tmp_path, stories):
    pytest.importorskip('datasets')
    for more, name in (['--tokenizer=bytes'], 'bytes'), (['--tokenizer=bpe', '--vocab_size=300'], 'tokenizers'):
        said = well(run('data/hub/prepare.py', [*stories, '--field=story', *more]))
        tokenizer = load_tokenizer(load_meta(tmp_path / 'out'))
        assert tokenizer.name == name and '1,000 documents' in said
        ids = np.fromfile(tmp_path / 'out/val_000000.bin', '<u2')
        texts = tokenizer.decode(ids, special=True).split(EOT)
        assert texts == [f'Story {i}: the cat sat, été.' for i in range(0, 1000, 100)] + ['']


@pytest.mark.parametrize('more, words', [
    ([], "have no text in a field 'text', but 'n', 'story': name it with --field=NAME"),
    (['--field=story', '--tokenizer=bpe', '--vocab_size=9'], 'at least 257'),
    (['--source='], 'give its name on the hub'),
    (['--source=nobody/nothing-at-all', '--data_files='], 'cannot be opened'),
    (['--field=n'], "no text in a field 'n'")], ids=str)
def test_mistakes_with_the_hub(tmp_path, stories, more, words):
    pytest.importorskip('datasets')
    done = run('data/hub/prepare.py', [*stories, '--tokenizer=bytes', *more])
    said = done.stderr.decode().splitlines()
    assert done.returncode == 2 and said[-1].startswith('error: ') and words in said[-1]
    assert not list(tmp_path.glob('out/*.bin'))
