"""From files of documents to packed sequences of tokens, streaming and in bounded memory.

Modules, in the order of the flow:

    units      which files (or row ranges) are worked on together, stable when files are added
    records    raw rows of Parquet, JSON Lines and plain text files
    documents  what is usable of them; bad rows as dead letters
    tokenizer  trained byte-level BPE, or one loaded from a folder, URI or hub name
    packing    documents joined by EOS, cut into sequences that remember who owns each position

The smallest use:

    packer = Packer(sequence_length=256, eos_id=0, dtype=token_dtype(8192), part_rows=62_500)
    for document in read_documents(uri, file=0, name="a.parquet", settings=source):
        if isinstance(document, Document):
            (ids,) = tokenizer.encode_batch([document.text])
            for packed in packer.add(document, ids):
                write(tokens_table(packed))
    write(tokens_table(packer.finish()))
"""
