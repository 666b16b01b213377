// Applies the chosen appearance before the page is painted, so that it does not flash. It is no
// module, because modules run only after the first paint.
"use strict";
try {
  const chosen = localStorage.getItem("chameleon.appearance");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing for this page follows the system.
}
