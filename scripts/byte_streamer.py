"""Streams the text of a byte-level model character by character."""

import codecs

from transformers import ByT5Tokenizer, TextStreamer


class ByteStreamer(TextStreamer):
    """Prints each character as soon as its last byte is there.

    `TextStreamer` waits for a space and decodes the whole line again at every token: with one token per byte, a line
    of code appears late and a long one costs quadratic time. Here a UTF-8 decoder keeps the bytes of a character that
    is not complete yet; bytes that are no UTF-8 show as U+FFFD, so that the reader sees what the model wrote.
    """

    def __init__(self, tokenizer: ByT5Tokenizer, skip_prompt: bool = False):
        super().__init__(tokenizer, skip_prompt=skip_prompt)
        self.first_byte = tokenizer.convert_tokens_to_ids("\0")
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, value):
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.next_tokens_are_prompt = False
        symbols = [token_id - self.first_byte for token_id in value.reshape(-1).tolist()]
        # What is no byte is a special token: nothing to print.
        text = self.decoder.decode(bytes(symbol for symbol in symbols if 0 <= symbol < 256))
        if text:
            self.on_finalized_text(text)

    def end(self):
        self.next_tokens_are_prompt = True
        self.on_finalized_text(self.decoder.decode(b"", final=True), stream_end=True)
        self.decoder.reset()


def streamer_for(tokenizer, *, skip_prompt: bool = False) -> TextStreamer:
    """The streamer that suits a tokenizer."""
    if isinstance(tokenizer, ByT5Tokenizer):
        return ByteStreamer(tokenizer, skip_prompt=skip_prompt)
    return TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
