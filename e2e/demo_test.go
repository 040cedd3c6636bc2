// Package e2e tests what a person sees: it opens the demo's page in a real
// browser. Where there is none the tests are skipped and say so.
package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

const patience = 60 * time.Second // for anything to appear on the page

// demo builds and starts the demo, and returns the address of its page and of
// one of its nodes. It is stopped by Ctrl-C when the test ends.
func demo(t *testing.T) (page, write string) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "kv")
	build := exec.Command("go", "build", "-o", bin, "./examples/kv")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	cmd := exec.Command(bin)
	var log strings.Builder
	out, err := cmd.StdoutPipe()
	cmd.Stderr = &log // read only once the process has ended
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var rest sync.WaitGroup
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		rest.Wait()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the demo, interrupted, ends with %v\n%s", err, &log)
		}
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if url, ok := strings.CutPrefix(line, "page"); ok {
			page = strings.TrimSpace(url)
		}
		if m := regexp.MustCompile(`^write .*(http://[^/]+)/`).FindStringSubmatch(line); m != nil {
			write = m[1]
		}
		if strings.Contains(line, "Ctrl-C") {
			break
		}
	}
	rest.Go(func() { io.Copy(io.Discard, out) })
	if page == "" || write == "" {
		t.Fatal("the demo prints no page, or no line to write with")
	}
	return page, write
}

// browser returns a tab of a headless browser. The test fails if a script of the
// page does.
func browser(t *testing.T) context.Context {
	t.Helper()
	var path string
	for _, name := range []string{"chromium-headless-shell", "headless-shell", "chromium", "chromium-browser", "google-chrome"} {
		if p, err := exec.LookPath(name); err == nil {
			path = p
			break
		}
	}
	if path == "" {
		t.Skip("there is no browser: install Debian's chromium-headless-shell, or another Chromium, to run this test")
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.DisableGPU, // as root, there is no sandbox
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true), chromedp.UserDataDir(t.TempDir()),
	)
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	console := chromedp.Console(ctx)
	if err := chromedp.Do(ctx); err != nil { // it starts the browser, for as long as ctx lives
		t.Fatalf("start %s: %v", path, err)
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		for m, err := range console {
			if err == nil && m.IsException() {
				t.Errorf("a script of the page fails: %v", m)
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		reader.Wait()
	})
	return ctx
}

// do runs the actions of one step of a test. If one fails the picture shows why.
func do(t *testing.T, ctx context.Context, what string, actions ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	step, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := chromedp.Do(step, actions...); err != nil {
		picture(t, ctx, "failed")
		t.Fatalf("%s: %v", what, err)
	}
}

// evaluate returns the value of a JavaScript expression.
func evaluate[T any](t *testing.T, ctx context.Context, expression string) T {
	t.Helper()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// picture keeps a picture of the page: with -artifacts where that says,
// otherwise it is removed after the test.
func picture(t *testing.T, ctx context.Context, name string) {
	t.Helper()
	png, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
	if err != nil {
		t.Logf("no picture: %v", err)
		return
	}
	file := filepath.Join(t.ArtifactDir(), name+".png")
	if err := os.WriteFile(file, png, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("picture: %s", file)
}

// until waits for a JavaScript expression to be true.
func until(expression string) chromedp.Action[chromedp.Void] {
	return chromedp.Poll[chromedp.Void](expression, chromedp.WithPollingInterval(100*time.Millisecond), chromedp.WithPollingTimeout(patience))
}

// press clicks a button that a card offers.
func press(node, label string) chromedp.Action[chromedp.Void] {
	return chromedp.Click(chromedp.CSS(fmt.Sprintf(`button[aria-label="%s: node %s"]:not(:disabled)`, label, node)))
}

func headline(s string) string {
	return fmt.Sprintf(`document.getElementById("headline").textContent.includes(%q)`, s)
}

func card(node, role string) string {
	return fmt.Sprintf(`[...document.querySelectorAll(".card")].some(c => c.querySelector(".badge").textContent == %q && c.querySelector(".rolename").textContent == %q)`, node, role)
}

// A newcomer opens the page, writes, kills the leader, restarts it, cuts a node
// off and lets it back.
func TestDemoPage(t *testing.T) {
	ctx := browser(t)
	page, node := demo(t)
	do(t, ctx, "open the page", chromedp.EmulateViewport(1200, 900), chromedp.Navigate(page), until(headline("leads term")))

	do(t, ctx, "write", chromedp.Click(chromedp.CSS(`#form button[value="PUT"]`)),
		until(`document.querySelector("#keys td")?.textContent == "hello" && document.getElementById("changes").textContent.includes("world")`))
	resp, err := http.Get(node + "/kv/hello")
	if err != nil {
		t.Fatal(err)
	}
	value, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || strings.TrimSpace(string(value)) != "world" {
		t.Fatalf("the node's answer is %q (%v), after the page wrote world", value, err)
	}
	picture(t, ctx, "desktop")

	find := `[...document.querySelectorAll(".card.role-Leader .badge")].map(e => e.textContent).join(",")`
	leader := evaluate[string](t, ctx, find)
	if len(leader) != 1 {
		t.Fatalf("leaders: %q", leader)
	}
	do(t, ctx, "kill the leader", press(leader, "Kill"), until(card(leader, "Stopped")), until(headline("leads term")))
	next := evaluate[string](t, ctx, find)
	if next == leader || len(next) != 1 {
		t.Fatalf("node %q leads after node %q was killed", next, leader)
	}
	do(t, ctx, "restart it", press(leader, "Restart"), until(card(leader, "Follower")))
	do(t, ctx, "cut it off", press(leader, "Partition"), until(`document.querySelectorAll(".card.cut").length == 1`))
	picture(t, ctx, "partitioned")
	do(t, ctx, "let it back", press(leader, "Heal"), until(`document.querySelectorAll(".card.cut").length == 0`), until(card(leader, "Follower")))
	do(t, ctx, "read", chromedp.Evaluate[chromedp.Void](`document.getElementById("value").value = ""`), chromedp.Click(chromedp.CSS(`#form button[value="GET"]`)),
		until(`document.getElementById("answer").textContent.startsWith("200") && document.getElementById("value").value == "world"`))
}

// On a phone nothing sticks out, and the dark scheme is dark.
func TestDemoOnPhone(t *testing.T) {
	ctx := browser(t)
	page, _ := demo(t)
	do(t, ctx, "open the page", chromedp.EmulateViewport(390, 844, chromedp.EmulateMobile), chromedp.Navigate(page), until(headline("leads term")))
	ground := `getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)`
	for _, scheme := range []struct {
		name string
		dark bool
	}{{"light", false}, {"dark", true}} {
		_, err := chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme.name}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if sum := evaluate[int](t, ctx, ground); (sum < 3*128) != scheme.dark {
			t.Errorf("%s: the page's background has %d of 765", scheme.name, sum)
		}
		if evaluate[bool](t, ctx, `document.documentElement.scrollWidth > innerWidth`) {
			t.Errorf("%s: the page is wider than the screen", scheme.name)
		}
		picture(t, ctx, scheme.name)
	}
}
