// Numbers as people read them.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 6013 -> "6,013" */
export const whole = (number) => WHOLE.format(number);

/** 0.382 -> "38 %"; small shares keep a digit. */
export function percent(share) {
  const value = 100 * share;
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : WHOLE.format(value)} %`;
}

/** 0.412 -> "0.41 s", 73 -> "73 s" */
export function seconds(value) {
  return `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : WHOLE.format(value)} s`;
}

/** 0, 12.3, 140 */
export const rate = (value) => (value > 0 && value < 99.95 ? value.toFixed(1) : WHOLE.format(value));

/** Bytes in the unit that leaves one to four digits. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit && value < 100 ? value.toFixed(1) : WHOLE.format(value)} ${units[unit]}`;
}
