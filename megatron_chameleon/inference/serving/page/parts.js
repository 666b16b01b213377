// The parts of a message: texts and images in reading order, as the model sees them.
//
//     {type: "text", text}
//     {type: "image", url, width, height, name?, isPartial?}
//
// A message is written in one field, so its images stand before the text unless the text names
// their place: "Add [image 1] to [image 2]."

const PLACE = /\[image (\d{1,3})\]/gi;

/** The words that put an image at a place of the text; images are counted from 1. */
export const placeOf = (number) => `[image ${number}]`;

/**
 * The parts that a text and the images beside it make.
 * @param {string} text
 * @param {object[]} images Image parts. Those that the text does not name stand first; a place that
 *     names no image, or one that already has its place, stays text.
 */
export function joinParts(text, images) {
  const placed = new Set();
  const rest = [];
  let from = 0;
  for (const match of text.matchAll(PLACE)) {
    const index = Number(match[1]) - 1;
    if (!images[index] || placed.has(index)) continue;
    placed.add(index);
    addText(rest, text.slice(from, match.index));
    rest.push(images[index]);
    from = match.index + match[0].length;
  }
  addText(rest, text.slice(from));
  return [...images.filter((_, index) => !placed.has(index)), ...rest];
}

/** The text and the images that make these parts: the inverse of `joinParts`. */
export function splitParts(parts) {
  const images = parts.filter((part) => part.type === "image");
  const first = parts.findIndex((part) => part.type !== "image");
  const leading = first < 0 ? parts.length : first;
  let text = "";
  let number = 0;
  parts.forEach((part, index) => {
    if (part.type === "text") text += part.text;
    else {
      number += 1;
      if (index >= leading) text += placeOf(number);
    }
  });
  return { text, images };
}

/** Parts without what no model can be asked about: blank text alone, and images that are cut off. */
export function usable(parts) {
  const kept = parts.filter((part) => (part.type === "text" ? part.text : !part.isPartial));
  return kept.some((part) => part.type === "image" || part.text.trim()) ? kept : [];
}

/** Two messages as one, with a blank line between their texts. */
export function mergeParts(first, second) {
  const merged = [...first];
  const isBetweenTexts = first.at(-1)?.type === "text" && second[0]?.type === "text";
  if (isBetweenTexts) addText(merged, "\n\n");
  for (const part of second) part.type === "text" ? addText(merged, part.text) : merged.push(part);
  return merged;
}

/** Append text to a list of parts, joining it with the text before it. */
export function addText(parts, text) {
  if (!text) return;
  const last = parts.at(-1);
  if (last?.type === "text") parts[parts.length - 1] = { ...last, text: last.text + text };
  else parts.push({ type: "text", text });
}

/** The text of a message alone. */
export const textOf = (parts) =>
  parts.map((part) => (part.type === "text" ? part.text : "")).join("");

/** Text that every JSON reader takes: half a surrogate pair becomes a replacement character. */
export const wellFormed = (text) => text.replace(/\p{Surrogate}/gu, "\ufffd");
