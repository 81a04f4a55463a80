"""What scripts/test-page.sh does with the page: `test_page.py URL ROWS.jsonl FOLDER`, which gets pictures."""

import sys
import tempfile

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

URL, ROWS, FOLDER = sys.argv[1:]
PROMPT = "An old teacher is waiting at the harbour."

options = webdriver.ChromeOptions()
for flag in [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    f"--user-data-dir={tempfile.mkdtemp()}",
]:
    options.add_argument(flag)
options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
service = webdriver.ChromeService("/usr/bin/chromedriver")
browser = webdriver.Chrome(options=options, service=service)
passed = 0


def check(name, ok):
    global passed
    print(f"{'ok' if ok else 'FAILED'}: {name}")
    if not ok:
        picture("failed")
        sys.exit(1)
    passed += 1


def get(name):
    return browser.find_element(By.ID, name)


def wait(what, seconds=120):
    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(lambda _: what())


def answers(column=0):
    found = browser.find_elements(By.CSS_SELECTOR, f"#messages-{column} .message.assistant")
    return [message.text for message in found]


def picture(name):
    browser.save_screenshot(f"{FOLDER}/{name}.png")


def size(width, height):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    )


def scheme(name):
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def ask(text, keys=Keys.ENTER):
    get("text").send_keys(text, keys)
    wait(lambda: get("send").text == "Send" and not get("text").get_attribute("value"))


try:
    size(1280, 900)
    browser.get(URL)
    model = Select(get("model-0"))
    wait(lambda: len(model.options) == 7)
    model.select_by_value("pirate")
    browser.execute_script("document.querySelector('details').open = true")
    get("temperature").clear()
    get("temperature").send_keys("0")
    ask(PROMPT)
    check("an answer of the pirate's", answers()[0].startswith('pirate\n"Arr'))
    model.select_by_value("butler")
    get("clear").click()
    check("a new chat", answers() == [])
    ask(PROMPT)
    model.select_by_value("pirate")
    ask("The rain has not stopped.")
    check("another adapter in mid-conversation", [a.split("\n")[0] for a in answers()] == ["butler", "pirate"])

    get("clear").click()
    get("compare").click()
    Select(get("model-1")).select_by_value("butler")
    ask(PROMPT)
    both = [answers(0)[0], answers(1)[0]]
    check("two beside each other", both[0].startswith("pirate") and both[1].startswith("butler"))

    get("file").send_keys(ROWS)
    check("the file's name is that of the adapter", get("suffix").get_property("value") == "rows")
    for name, value in [("steps", "6"), ("length", "4")]:
        get(name).clear()
        get(name).send_keys(value)
    get("start").click()
    job = wait(lambda: browser.find_elements(By.CSS_SELECTOR, ".job"))[0]
    wait(lambda: browser.find_elements(By.CSS_SELECTOR, ".job .succeeded"))
    job = browser.find_element(By.CSS_SELECTOR, ".job")
    check("a loss curve", "M" in job.find_element(By.CSS_SELECTOR, "path.train").get_attribute("d"))
    name = job.find_element(By.TAG_NAME, "strong").text
    job.find_element(By.XPATH, ".//button[text()='Try it']").click()
    wait(lambda: Select(get("model-0")).first_selected_option.text == name)
    ask(PROMPT)
    check("an answer of what was trained", answers(0)[-1].startswith("ft:base:rows:"))

    for picture_name, width, height, colours in [
        ("light", 1280, 900, "light"), ("dark", 1280, 900, "dark"), ("narrow", 390, 844, "dark"),
        ("narrow-light", 390, 1800, "light"),
    ]:
        size(width, height)
        scheme(colours)
        picture(picture_name)
        over = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        check(f"{picture_name}: nothing is wider than the window", over <= 0)
    unlabelled = browser.execute_script(
        "return [...document.querySelectorAll('input, select, textarea')].filter(it => !it.labels.length).map(it => it.id)"
    )
    check("everything has a label", unlabelled == [])
    size(1280, 900)
    browser.execute_script("document.getElementById('compare').focus()")
    reached = ["compare"]
    for _ in range(8):
        webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.execute_script("return document.activeElement.id"))
    check("the keyboard reaches the parts of a chat", {"clear", "model-0", "messages-0", "text", "send"} <= set(reached))
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    check(f"no complaints {complaints}", complaints == [])
    print(f"{passed} passed, 0 failed")
finally:
    browser.quit()
