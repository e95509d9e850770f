"use strict";

// Decodes what worldloom/view/encoding.py writes: arrays and sheets of small pictures.

/** Return the bytes of a base64 text. */
function decodeBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Return {shape, values: Float32Array} of a packed array; the highest code is NaN. */
function decodeArray(packed) {
  if (packed === null) return null;
  const bytes = decodeBase64(packed.data);
  const codes = packed.bits === 8 ? bytes : new Uint16Array(bytes.buffer);
  const top = 2 ** packed.bits - 2;
  const width = packed.low.length;
  const values = new Float32Array(codes.length);
  for (let i = 0; i < codes.length; i++) {
    const low = packed.low[i % width];
    const share = codes[i] / top;
    values[i] = codes[i] > top ? NaN : low + share * (packed.high[i % width] - low);
  }
  return { shape: packed.shape, values };
}

/** Return the numbers of an array at leading indices, as a view. */
function readRow(array, ...indices) {
  let size = array.values.length;
  let offset = 0;
  indices.forEach((index, axis) => {
    size /= array.shape[axis];
    offset += index * size;
  });
  return array.values.subarray(offset, offset + size);
}

/** Return one number of each row of an array [rows, width]. */
function readColumn(array, column) {
  const width = array.shape[array.shape.length - 1];
  const values = new Float32Array(array.values.length / width);
  for (let i = 0; i < values.length; i++) values[i] = array.values[i * width + column];
  return values;
}

/** Pictures of one size in sheets, which are decoded when they are first drawn. */
class Pictures {
  /** onload: called whenever another sheet can be drawn. */
  constructor(packed, onload) {
    this.width = packed.width;
    this.height = packed.height;
    this.count = packed.count;
    this.columns = packed.columns;
    this.perSheet = packed.columns * packed.lines;
    this.sources = packed.sheets;
    this.sheets = [];
    this.onload = onload;
  }

  /** Draw a picture in its own size at the origin; return whether it could be drawn. */
  draw(context, index) {
    const number = Math.floor(index / this.perSheet);
    if (!this.sheets[number]) this.load(number);
    const sheet = this.sheets[number];
    if (!sheet.complete || !sheet.naturalWidth) return false;
    const place = index % this.perSheet;
    const x = (place % this.columns) * this.width;
    const y = Math.floor(place / this.columns) * this.height;
    const size = [this.width, this.height];
    context.drawImage(sheet, x, y, ...size, 0, 0, ...size);
    return true;
  }

  load(number) {
    const sheet = new Image();
    sheet.onload = this.onload;
    sheet.src = this.sources[number];
    this.sheets[number] = sheet;
  }
}
