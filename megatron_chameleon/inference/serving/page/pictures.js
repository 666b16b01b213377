// Images of the user: reading files, making large ones smaller, and how large they are shown.

/** Longest edge of an image that is sent, in pixels: twice what Chameleon reads. */
export const MOST_PIXELS = 1024;
/** Largest file that is sent as it is; a larger one is written again. */
export const MOST_BYTES = 1024 * 1024;
/** Images of one message. */
export const MOST_IMAGES = 12;

/** What the server decodes; other formats are written again as PNG if the browser reads them. */
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/**
 * An image part out of a file that was chosen, pasted or dropped.
 * @param {Blob} file
 * @throws {Error} It is no image that this browser reads; the message says which file.
 */
export async function readImage(file) {
  const name = file.name || "pasted image";
  const address = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = address;
    try {
      await image.decode();
    } catch {
      throw new Error(`“${name}” is not an image that this browser can read.`);
    }
    // A drawing (SVG) without a size of its own has none here either.
    const width = image.naturalWidth || 512;
    const height = image.naturalHeight || 512;
    const scale = Math.min(1, MOST_PIXELS / Math.max(width, height));
    if (scale === 1 && file.size <= MOST_BYTES && SENT_AS_THEY_ARE.includes(file.type)) {
      return { type: "image", url: await dataUrl(file), width, height, name };
    }
    return { type: "image", name, ...redraw(image, width * scale, height * scale, file.type) };
  } finally {
    URL.revokeObjectURL(address);
  }
}

function redraw(image, wide, high, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(wide));
  canvas.height = Math.max(1, Math.round(high));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  // A photograph stays one; everything else keeps its transparency.
  const url = type === "image/jpeg" ? canvas.toDataURL(type, 0.92) : canvas.toDataURL("image/png");
  return { url, width: canvas.width, height: canvas.height };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`“${file.name}” cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** The images of a paste or a drop, as files. */
export async function imagesOf(transfer) {
  const files = [...transfer.files];
  if (files.length) return files;
  // An image that is dragged out of this page arrives as its address.
  const address = transfer.getData("text/uri-list").split(/[\r\n]/)[0];
  if (!address.startsWith("data:image/")) return [];
  const match = /^data:(image\/[a-z+]+);base64,(.*)$/.exec(address);
  if (!match) return [];
  const bytes = Uint8Array.from(atob(match[2]), (letter) => letter.charCodeAt(0));
  return [new File([bytes], "image", { type: match[1] })];
}

/**
 * How large an image is shown, in CSS pixels. Tiny images are enlarged by a whole number, so that
 * each of their pixels is a square.
 */
export function displaySize(width, height) {
  const longest = Math.max(width, height, 1);
  const scale = longest <= 96 ? Math.max(2, Math.round(192 / longest)) : 1;
  return { width: width * scale, height: height * scale, isEnlarged: scale > 1 };
}

/** Width and height of an image, once the browser knows them. */
export async function sizeOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return { width: image.naturalWidth, height: image.naturalHeight };
}
