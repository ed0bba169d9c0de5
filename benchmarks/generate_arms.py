"""CodecLM without its filter, for the ablation of `benchmarks/generate.py`."""

from collections.abc import Sequence

from stillhouse.generation.asking import Item, Program
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generated, Workshop, usable
from stillhouse.generation.methods.codec import Codec, mixed
from stillhouse.generation.screening import answer_fault


class Unfiltered(Codec):
    """Every instruction is delivered after `iterations - 1` rewrites, with the strong answer."""

    def make(self, workshop: Workshop, seeds: Sequence[Item]) -> Generated:
        described = usable(workshop, workshop.run("encode", "encode", seeds))
        entries = mixed(described, self.num_metadata, self.seed)
        kept: list[Item] = []
        for wave in range(self.waves):
            first = wave * self.num_pairs
            items = [
                entries[i % len(entries)] | {"draw": self.seed_of(i), "history": [], "gap": 0.0}
                for i in range(first, first + self.num_pairs)
            ]
            items = usable(workshop, workshop.run("write", "write", items))
            for _ in range(self.iterations - 1):
                items = usable(workshop, workshop.run("rewrite", "rewrite", items))
            items = workshop.screened(items, "instruction")
            kept += usable(workshop, workshop.run("answer", "answered", items))
            if len(kept) >= self.num_pairs:
                break
        kept = kept[: self.num_pairs]
        return Generated(kept, [len(kept)])

    def answered(self, item: Item, judge: Judge) -> Program:
        """The strong model's answer."""
        [answer] = yield [self.answering(item["instruction"])]
        given = {"response": answer.text, "answered_by": "strong", "fault": answer_fault(answer)}
        return item | given | {"strong_score": 0.0, "student_score": 0.0}
