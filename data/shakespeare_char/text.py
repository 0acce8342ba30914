"""The text of tinyshakespeare, 1,115,394 characters, shared by shakespeare_char and shakespeare."""
import hashlib
import os
import urllib.request
from pathlib import Path

from data.tokenizers import read_text
from data.tokens import DataError

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def tiny_shakespeare(input_file=''):
    """The text in input_file. By default that is input.txt in this folder, which is downloaded if missing."""
    path = Path(input_file) if input_file else Path(__file__).with_name('input.txt')
    if not input_file and not path.exists():
        try:
            with urllib.request.urlopen(URL, timeout=60) as response:
                data = response.read()
        except OSError as error:
            raise DataError(f"cannot download {URL} ({error}): get it in another way and give "
                            "--input_file=PATH") from None
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise DataError(f"{URL} sent {len(data)} bytes that are not the expected text: try again, or get it in "
                            "another way and give --input_file=PATH")
        new = path.with_name(f'input.txt.{os.getpid()}.tmp') # another process may be downloading it too
        new.write_bytes(data)
        os.replace(new, path)
    return read_text(path)
