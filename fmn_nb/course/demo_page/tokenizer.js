/* CLIP's tokenizer, from the vocabulary and the merges of tokenizer.json: a prompt as token ids, and where its words
   stand among them. */
"use strict";
globalThis.FMN = globalThis.FMN || {};

FMN.Tokenizer = class {
  /* data: vocabulary {token: id}, merges [[left, right], ...] by rank, begin, end (ids), special {text: id}, columns. */
  constructor(data) {
    this.data = data;
    this.ranks = new Map(data.merges.map(([left, right], rank) => [left + " " + right, rank]));
    this.specials = new RegExp(
      "(" + Object.keys(data.special).map((text) => text.replace(/[|<>]/g, "\\$&")).join("|") + ")");
  }

  /* The prompt's words as {text, ids}, without begin and end. */
  words(prompt) {
    const found = [];
    for (const part of prompt.split(this.specials)) {
      if (part in this.data.special) {
        found.push({ text: part, ids: [this.data.special[part]] });
        continue;
      }
      const plain = part.normalize("NFC").replace(/\s+/gu, " ").toLowerCase();
      for (const [piece] of plain.matchAll(FMN.Tokenizer.pieces)) {
        for (const [text] of piece.matchAll(FMN.Tokenizer.parts)) {
          found.push({ text, ids: this.merged(text) });
        }
      }
    }
    return found;
  }

  /* Ids [columns]: begin, words, end, padded with the end; and each word with the columns it has there, which are none
     where the prompt is too long. */
  read(prompt) {
    const { begin, end, columns } = this.data;
    const ids = new Int32Array(columns).fill(end);
    ids[0] = begin;
    let column = 1;
    const words = this.words(prompt).map(({ text, ids: own }) => {
      const there = own.filter((id) => column < columns - 1 && ((ids[column++] = id), true));
      return { text, columns: there.map((_, i) => column - there.length + i), whole: there.length === own.length };
    });
    return { ids, words, cutOff: words.filter((word) => !word.whole).map((word) => word.text) };
  }

  /* The columns of a phrase in a prompt that was read, all its occurrences. */
  find(read, phrase) {
    const wanted = this.words(phrase).map((word) => word.text);
    const columns = new Set();
    for (let start = 0; wanted.length && start + wanted.length <= read.words.length; start++) {
      const there = read.words.slice(start, start + wanted.length);
      if (there.every((word, i) => word.text === wanted[i])) {
        there.forEach((word) => word.columns.forEach((column) => columns.add(column)));
      }
    }
    return [...columns].sort((one, other) => one - other);
  }

  /* The ids of one word: its bytes as letters, neighbours merged by the lowest rank until none is known. */
  merged(text) {
    const letters = [...new TextEncoder().encode(text)].map((byte) => FMN.Tokenizer.letters[byte]);
    letters[letters.length - 1] += "</w>";
    for (;;) {
      let best = -1, lowest = Infinity;
      for (let i = 0; i + 1 < letters.length; i++) {
        const rank = this.ranks.get(letters[i] + " " + letters[i + 1]);
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) break;
      const [left, right] = [letters[best], letters[best + 1]];
      for (let i = 0; i + 1 < letters.length; i++) {
        if (letters[i] === left && letters[i + 1] === right) letters.splice(i, 2, left + right);
      }
    }
    return letters.map((token) => this.data.vocabulary[token] ?? this.data.end);
  }
};

/* CLIP's own cut into pieces, then that of the byte-level alphabet. */
FMN.Tokenizer.pieces =
  /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;
FMN.Tokenizer.parts = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+/gu;

/* GPT-2's alphabet: a printable letter for each byte. */
FMN.Tokenizer.letters = (() => {
  const printable = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let others = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : 256 + others++));
})();
