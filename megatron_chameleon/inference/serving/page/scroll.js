// Stays at the end while an answer grows, unless the user has scrolled up; and keeps the page as
// high as what is visible of it.

/** So near to the end counts as being there, in CSS pixels. */
const NEAR = 64;

export class Follower {
  #scroller;
  #button;
  #isFollowing = true;

  constructor(scroller, content, button) {
    this.#scroller = scroller;
    this.#button = button;
    let last = 0;
    scroller.addEventListener(
      "scroll",
      () => {
        const isUp = scroller.scrollTop < last;
        last = scroller.scrollTop;
        // Only the user scrolls up. What the page itself does goes down.
        if (this.#isNearEnd()) this.#isFollowing = true;
        else if (isUp) this.#isFollowing = false;
        this.#show();
      },
      { passive: true },
    );
    button.addEventListener("click", () => this.toEnd());
    // An image that has loaded, a longer text, a phone that was turned: all change the height.
    const observer = new ResizeObserver(() => this.follow());
    observer.observe(content);
    observer.observe(scroller);
  }

  /** Go to the end, and stay there. */
  toEnd() {
    this.#isFollowing = true;
    this.follow();
  }

  follow() {
    if (this.#isFollowing) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#show();
  }

  #isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  #show() {
    this.#button.hidden = this.#isFollowing || this.#isNearEnd();
  }
}

/**
 * Keep the page as high as the part that the on-screen keyboard leaves. Safari does not shrink the
 * page for its keyboard but moves it up, so the height comes from the visual viewport.
 */
export function fitToViewport(viewport = globalThis.visualViewport) {
  if (!viewport) return;
  const fit = () => {
    // Zooming with two fingers also changes the viewport; the page must not follow that.
    if (viewport.scale > 1.01) return;
    const isCovered = innerHeight - viewport.height > 80;
    document.documentElement.style.setProperty("--height", isCovered ? `${viewport.height}px` : "100dvh");
    if (isCovered) scrollTo(0, 0);
  };
  viewport.addEventListener("resize", fit);
  fit();
}
