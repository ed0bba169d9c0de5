"""From files of documents to packed sequences of tokens, streaming and in bounded memory.

Modules, in the order of the flow:

    records     raw rows of files of the `formats` in `rows`; `decoding` decompresses them
    documents   usable texts of rows (`values`); bad rows as dead letters
    duplicates  exact duplicates and held-out splits
    tokenizer   trained byte-level BPE, or one loaded from a folder, URI or hub name
    packing     documents joined by EOS, cut into sequences with the owner of every position
    pieces      token parts read back as arrays
    tasks       units (groups of files or ranges of rows); their scanning and packing

Example:

    packer = Packer(sequence_length=256, eos_id=0, dtype=token_dtype(8192), part_rows=62_500)
    for document in read_documents(uri, file=0, name="a.parquet", settings=source):
        if isinstance(document, Document):
            (ids,) = tokenizer.encode_batch([document.text])
            for packed in packer.add(document, ids):
                write(tokens_table(packed))
    write(tokens_table(packer.finish()))
"""
