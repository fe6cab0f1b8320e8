"""A folder's language model answering: `compresslab chat` in the terminal, `compresslab serve` over HTTP.

folder -> runtimes.open_runtime -> Runtime (encode, stream of token ids, decode) -> generation.generate (text, stop strings)
       -> chat.Chat, or worker.Worker (one generation at a time) -> api.make_app (OpenAI's API)
"""
