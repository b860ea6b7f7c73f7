@dataclass
class Instance:
    """One encoded example, its visual tokens, and how the model answers with all of them."""

    index: int
    encoded: Encoded
    """One row."""
    real: np.ndarray
    """Which tokens are no padding, bool (N,)."""
    positions: np.ndarray
    """Row and column of each token, float32 (N, 2), 0 for padding."""
    full: Scores | None = None
    """Scores with every token kept, fields of shape (1, 1); ``None`` until they are needed."""

    @property
    def example(self) -> Example:
        """The example itself."""
        return self.encoded.examples[0]

    def relevant(self) -> list[int] | None:
        """Return the tokens that decide the answer, most relevant first; ``None`` where nobody knows."""
        grades = self.example.token_relevance(self.positions)
        if grades is None:
            return None
        grades = np.where(self.real, grades, 0.0)
        order = np.argsort(-grades, kind="stable")
        return [int(token) for token in order if grades[token] > 0]




    def _load(self, indices: Iterable[int]) -> dict[int, Instance]:
        """Return instances by index, from the cache where they are there; the others are encoded together."""
        wanted = list(dict.fromkeys(indices))
        found = {index: self._cache[index] for index in wanted if index in self._cache}
        missing = [index for index in wanted if index not in found]
        if missing:
            encoded = self.vlm.encode([self.task.example(self.split, index) for index in missing])
            found |= {index: self._instance(index, encoded[[row]]) for row, index in enumerate(missing)}
        for index in wanted:
            self._cache[index] = found[index]
            self._cache.move_to_end(index)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return found

    def _instance(self, index: int, encoded: Encoded) -> Instance:
        mask = encoded.token_mask[0].cpu().numpy()
        real = _fit(mask, self.max_tokens)
        if real.sum() != mask.sum():
            raise ValueError(
                f"example {index} of split {self.split!r} has {mask.sum()} visual tokens but the observation space has "
                f"room for {self.max_tokens}: pass max_tokens={mask.sum()} or more"
            )
        words = int(encoded.question_mask[0].sum())
        if self.question_aware and words > self.max_question_tokens:
            raise ValueError(
                f"the question of example {index} of split {self.split!r} has {words} tokens but the observation space "
                f"has room for {self.max_question_tokens}: pass max_question_tokens={words} or more"
            )
        positions = _fit(_array(encoded.positions[0]), self.max_tokens) * real[:, None]
        return Instance(index, encoded, real, np.clip(positions, 0.0, 1.0))

    def _score(self, jobs: Sequence[tuple[Instance, np.ndarray]]) -> list[Scores]:
        batch = Encoded.concatenate([instance.encoded for instance, _ in jobs])
        length = batch.token_mask.shape[1]
        chosen = torch.from_numpy(np.stack([_fit(selection, length) for _, selection in jobs]))[:, None]
        with torch.no_grad():
            scores = self.vlm.score(batch, chosen.to(batch.token_mask.device))
        likelihood, correct = scores.log_likelihood.float().cpu(), scores.correct.cpu()  # (B, 1)
        return [Scores(likelihood[row : row + 1], correct[row : row + 1]) for row in range(len(jobs))]



def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _fit(rows: np.ndarray, length: int) -> np.ndarray:
    """Return a copy of ``rows`` cut or zero-padded to ``length``."""
    fitted = np.zeros((length, *rows.shape[1:]), dtype=rows.dtype)
    fitted[: len(rows)] = rows[:length]
    return fitted
